"""Every Python block of the README and the docs runs, in order, as a reader would.

A block behind a line `<!-- needs NAME -->` is left out where NAME cannot be imported.
"""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if "```python\n" in page.read_text()
]


def run(text, name):
    found = re.findall(
        r"(?:<!-- needs ([\w.]+) -->\n+)?```python\n(.*?)```", text, re.DOTALL
    )
    namespace = {"__name__": "__main__"}
    for number, (needed, block) in enumerate(found, 1):
        if needed and not importable(needed):
            continue
        code = compile(block, f"{name}, block {number}", "exec")
        exec(code, namespace)
    return namespace


def importable(name):
    try:
        pytest.importorskip(name)
    except pytest.skip.Exception:
        return False
    return True


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
    run(page.read_text(), page.name)


def test_a_block_that_needs_what_is_missing_is_left_out():
    text = "```python\nseen = []\n```\n"
    for needed in ("json", "no_such_package"):
        text += f"<!-- needs {needed} -->\n```python\nseen += ['{needed}']\n```\n"
        text += "Others run.\n\n```python\nseen += ['other']\n```\n"
    assert run(text, "a page")["seen"] == ["json", "other", "other"]


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
