"""What a Cloud AI card's number formats cost, measured on the host: the demo model and the real all-MiniLM-L6-v2.

python benchmarks/numerics.py --output docs/cloud_ai_numerics.md
"""

from __future__ import annotations

import argparse
import datetime
import platform
import tempfile
from pathlib import Path

from peers.embedding import minilm_directory, sentences
from quality import SAMPLES, text_of
from shapes import DEMO_MODEL

from QEfficient import QEFFAutoModel, QEFFAutoModelForCausalLM
from QEfficient.evaluate.numerics_report import HEADINGS, NumericsReport

#: Word problems whose text perplexity is taken of, questions that are answered, tokens of each answer, embedded texts.
PROBLEMS, PROMPTS, TOKENS, TEXTS = 40, 16, 32, 64
_END = "<|endoftext|>"

_INTRODUCTION = """# What a card's number formats cost

Made by `make bench-numerics` (`python benchmarks/numerics.py --output docs/cloud_ai_numerics.md`) on {date}, {machine}.
No card took part: the host computed with the formats, as [Cloud AI](cloud_ai.md#numbers-before-there-is-a-card) says,
with what is exact there and what is assumed. The same for a model of your own:
`qefficient validate MODEL --simulate qaic`.

All rows but fp32 compute in float16. mxfp6: weights of matrix products in MXFP6 (E2M3), 6.25 bits each. mxint8 KV: keys
and values in MXINT8, 8.25 bits each. A small difference of perplexity, in either direction, says less than cosines and
first choices do.
"""


def demo(home: Path) -> NumericsReport:
    model = QEFFAutoModelForCausalLM.from_pretrained(DEMO_MODEL, cache_home_dir=home)
    model.compile(ctx_len=256, progress=False)
    problems = text_of(SAMPLES).split(_END)[:PROBLEMS]
    questions = [problem.split("\nAnswer:")[0] + "\nAnswer:" for problem in problems[:PROMPTS]]
    return model.validate(questions, simulate="qaic", text=_END.join(problems), tokens=TOKENS)


def minilm(home: Path) -> NumericsReport:
    model = QEFFAutoModel.from_pretrained(minilm_directory(), pooling="mean", cache_home_dir=home)
    return model.validate(sentences(None, TEXTS), simulate="qaic")


def section(title: str, what: str, report: NumericsReport) -> str:
    """A table of a report as Markdown."""
    rows = [HEADINGS, ("---", *["---:"] * (len(HEADINGS) - 1)), *report.cells()]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    notes = "\n".join(f"- {note}" for note in report.notes())
    return f"\n## {title}\n\n{what}\n\n{table}\n\n{notes}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="Markdown file to write; printed when not given")
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as home:
        parts = [
            section(
                "Demo model (causal, 4.7 million parameters)",
                f"Perplexity of {PROBLEMS} word problems it was not trained on; {TOKENS} greedy tokens after each of "
                f"{PROMPTS} questions, the same tokens for every row.",
                demo(Path(home)),
            ),
            section(
                "all-MiniLM-L6-v2 (embeddings)",
                f"{TEXTS} texts, each alone, mean pooling. An encoder makes no text and keeps no keys and values.",
                minilm(Path(home)),
            ),
        ]
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    page = _INTRODUCTION.format(date=datetime.date.today().isoformat(), machine=machine) + "".join(parts)
    if output is None:
        print(page)
    else:
        output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
