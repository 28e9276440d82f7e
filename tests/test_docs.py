"""Every Python example in the README and in docs/ runs, in order, from the repository root."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[str]:
    return [block for block in BLOCK.findall(page.read_text(encoding="utf-8")) if "# doc: no-run" not in block]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A cache of the pages' own: most of them run the same model."""
    return tmp_path_factory.mktemp("home")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_examples_run(page, home, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("QEFF_HOME", str(home))
    names: dict[str, object] = {"__name__": "docs"}
    for number, block in enumerate(blocks(page)):
        code = block.replace('QEfficient.load("my-package")', "QEfficient.load(model.qpc_path)")
        exec(compile(code, f"{page.name} block {number}", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"
