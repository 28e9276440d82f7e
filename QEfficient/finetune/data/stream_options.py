"""What ``streaming`` can be combined with: nothing that needs all rows before the first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from QEfficient.errors import OptionError
from QEfficient.finetune.data.filters import read_filters
from QEfficient.finetune.data.row_functions import read_functions, takes_one_row
from QEfficient.finetune.keywords import boolean, integer

if TYPE_CHECKING:
    from QEfficient.finetune.arguments import QEffTrainingArgs
    from QEfficient.finetune.config import QEffConfig

#: Rows that are shuffled together.
BUFFER = 10_000


def check_stream(config: QEffConfig) -> None:
    """Checks the options of a stream, given or not.

    Raises:
        OptionError: one is out of range, without ``streaming``, or needs all rows.
    """
    boolean("streaming", config.streaming)
    for name in ("shuffle_buffer_size", "eval_rows"):
        value = getattr(config, name)
        if value is not None:
            integer(name, value)
            if not config.streaming:
                raise OptionError(f"{name} is for streaming: set streaming=True, or leave it out.")
    if not config.streaming:
        return
    if config.method != "sft":
        raise OptionError(f"streaming is for method='sft', and not for {config.method!r}: leave it out.")
    if config.datasets is not None:
        raise OptionError("streaming is of one source, and datasets mixes several: stream one, or mix what is read.")
    if config.train_frac not in (type(config).train_frac, 1):
        raise OptionError(
            f"train_frac={config.train_frac} needs the number of rows, which a stream does not know: hold out the "
            "first rows with eval_rows, or name an eval_split."
        )
    if config.sample_size is not None:
        raise OptionError("sample_size draws from all rows, which a stream does not have: end the run with max_steps.")
    for item in read_filters(config.filters or ()):
        if item.remembers:
            raise OptionError(
                f"the filter {item.name} compares a row with all before it, which a stream does not keep: filter the "
                "data beforehand, for example with qefficient data convert."
            )
    for function in read_functions(config.preprocess or ()):
        if not takes_one_row(function.call):
            raise OptionError(
                f"{function.name} takes all rows at once, which a stream does not have: call its first parameter row."
            )


def check_stream_run(config: QEffConfig, args: QEffTrainingArgs) -> None:
    """Checks that a run can train on a stream.

    Raises:
        OptionError: it is to end, or to order rows, by something that needs the number or the lengths of all rows.
    """
    if not config.streaming:
        return
    if args.max_steps < 1:
        raise OptionError("streaming does not know how many rows an epoch has: set max_steps, not num_train_epochs.")
    if args.train_sampling_strategy == "group_by_length":
        raise OptionError("group_by_length sorts all rows by length, which a stream does not have: leave it out.")
    if args.epoch_decay is not None:
        raise OptionError("epoch_decay counts epochs, which a stream does not have: use lr_scheduler_type.")
