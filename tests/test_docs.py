"""Every Python block of the README and the docs runs, in order, as a reader would."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if "```python\n" in page.read_text()
]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] * (page.name != "README.md"))
        for page in PAGES
    ],
    ids=lambda page: page.name,
)
def test_code_on_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    namespace = {"__name__": "__main__"}
    for number, block in enumerate(blocks, 1):
        code = compile(block, f"{page.name}, block {number}", "exec")
        exec(code, namespace)


PROSE = [
    page
    for page in ROOT.glob("**/*.md")
    if not {part for part in page.relative_to(ROOT).parts if part.startswith(".")}
]


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\s?\(([^)#\s]+)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
