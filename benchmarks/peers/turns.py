"""Loaded engines take turns: A B C A B C, one command at a time, the others idle."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from peers.machine import available_mb, resident_mb
from peers.prepare import Prepared, Run
from peers.process import Message, PeerError, Worker

#: Memory that must stay free, MB.
_RESERVE = 2000.0
#: What an engine needs while it loads, as a multiple of its weights in memory, plus what any process needs, MB.
_LOADING, _PROCESS = 2.0, 700.0


@dataclass
class Player:
    """A contender in its turns: its worker, and the answers that count."""

    prepared: Prepared
    worker: Worker | None = None
    answers: list[Message] = field(default_factory=list)
    #: The answer to the command ``load``.
    loaded: Message = field(default_factory=dict)
    error: str | None = None
    peak_mb: float | None = None

    def ask(self, **command: Any) -> Message | None:
        """The answer; None after a failure, which ends this player's part."""
        if self.worker is None:
            return None
        try:
            answer = self.worker.ask(**command)
        except PeerError as error:
            self.error = str(error)
            self.leave()
            return None
        self.peak_mb = self.worker.peak_mb
        return answer

    def enter(self, run: Run, context: int) -> None:
        """Starts the worker and loads the model."""
        try:
            self.worker = Worker(run.launch(self.prepared.contender.engine))
        except PeerError as error:
            self.error = str(error)
            return
        self.loaded = self.ask(do="load", **self.prepared.setup(run.threads, context)) or {}

    def resident_mb(self) -> float:
        return 0.0 if self.worker is None else resident_mb(self.worker.process.pid)

    def leave(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None


def batches(
    run: Run, prepared: Sequence[Prepared], context: int, weights_mb: Callable[[Prepared], float]
) -> Iterator[list[Player]]:
    """Loads as many contenders as memory holds, yields them, and goes on with the others.

    The first one, ours, is part of every batch, so that each ratio comes from rounds the two had in common.

    Args:
        weights_mb: what the weights of a contender take in memory.
    """
    waiting = list(prepared[1:])
    while True:
        # Taken before anything is loaded: the kernel counts mapped weights as available, but they are in use.
        budget = available_mb() - _RESERVE
        players = [Player(prepared[0])]
        with closing(players):
            players[0].enter(run, context)
            while waiting:
                needed = _PROCESS + _LOADING * weights_mb(waiting[0])
                if len(players) > 1 and sum(player.resident_mb() for player in players) + needed > budget:
                    break
                players.append(Player(waiting.pop(0)))
                players[-1].enter(run, context)
            yield players
        if not waiting:
            return


@contextmanager
def closing(players: list[Player]) -> Iterator[None]:
    """Ends the workers of a list that is filled inside, whatever happens."""
    try:
        yield
    finally:
        for player in players:
            player.leave()


def take_turns(run: Run, players: Sequence[Player], command: Callable[[int], Message]) -> None:
    """A round that is not counted, then ``run.rounds`` that are; memory bandwidth is measured before each.

    Args:
        command: round -> the command, the same for everybody.
    """
    for turn in range(run.rounds + 1):
        run.read_memory()
        asked = command(turn)
        for player in players:
            if player.worker is None:
                continue
            time.sleep(run.pause)
            answer = player.ask(**asked)
            if answer is None:
                run.say(f"  {player.prepared.contender.title}: {player.error}")
            elif turn:
                player.answers.append(answer)
        run.say(f"  round {turn} of {run.rounds}")
