"""Killed at any moment, the next run succeeds and the cache is whole; eight processes at once do the work once."""

import json
import subprocess
import sys
from pathlib import Path

from tiny_models import greedy_reference, sample_prompt

from QEfficient.store.store import ArtifactStore

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from kill_test import kill_rounds

# Says when it is ready, waits for all the others, and reports what it imported and made.
RACER = """
import json, sys, time
from pathlib import Path
from QEfficient import QEFFAutoModelForCausalLM

checkpoint, home, gate, number = sys.argv[1:5]
model = QEFFAutoModelForCausalLM.from_pretrained(checkpoint, cache_home_dir=home)
Path(gate, number).touch()
while len(list(Path(gate).iterdir())) < 8:
    time.sleep(0.01)
package = model.compile(ctx_len=32)
torch = "torch" in sys.modules
exported = "QEfficient.exporter.program" in sys.modules
compiled = "QEfficient.targets.host_program" in sys.modules
import numpy as np
ids = model.generate(np.array([json.loads(sys.argv[5])]), max_new_tokens=8)
report = {"torch": torch, "exported": exported, "compiled": compiled}
print(json.dumps({"package": str(package), "ids": ids.tolist(), **report}))
"""


def test_eight_processes_compile_once(llama, tmp_path):
    gate, home, prompt = tmp_path / "gate", tmp_path / "home", sample_prompt()
    gate.mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(llama.checkpoint), str(home), str(gate), str(n), json.dumps(prompt)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(8)
    ]
    try:
        outcomes = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * 8, [error for _, error in outcomes]
    reports = [json.loads(output.splitlines()[-1]) for output, _ in outcomes]
    # What only the worker needs is imported by the worker alone.
    assert sum(report["torch"] for report in reports) == 1
    assert sum(report["exported"] for report in reports) == 1
    assert sum(report["compiled"] for report in reports) == 1
    assert len({report["package"] for report in reports}) == 1
    expected = [prompt + greedy_reference(llama.hf, prompt, 8)[0]]
    assert all(report["ids"] == expected for report in reports)
    store = ArtifactStore(home)
    assert sorted(entry.kind for entry in store.entries()) == ["exports", "packages"]
    assert store.verify_all() == []


def test_killed_at_random_moments(llama, tmp_path):
    outcome = kill_rounds(llama.checkpoint, tmp_path / "home", kills=6, seed=3)
    assert outcome.kills == 6
    assert outcome.problems == []
    assert outcome.interrupted >= 2, "the kills came too late to test anything"
