"""Every Python block of the README and the docs runs, in order, as a reader would.

A block behind a line `<!-- needs NAME -->` is left out where NAME cannot be imported.
"""

import doctest
import functools
import importlib.util
import inspect
import json
import pathlib
import re
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_bptt

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [
    page
    for page in sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("*/*.md"))
    if "```python\n" in page.read_text() and page.parent.name != "build"
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


def load(name):
    """A script of the documentation as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def importable(name):
    try:
        pytest.importorskip(name)
    except pytest.skip.Exception:
        return False
    return True


def check_drawn(draw, folder, largest=150_000):
    """The pictures that are drawn twice: the same bytes, and neither empty nor large."""
    first, again = (draw(folder / name) for name in ("first", "again"))
    first, again = (
        drawn if isinstance(drawn, list) else [drawn] for drawn in (first, again)
    )
    for path, same in zip(first, again, strict=True):
        assert path.read_bytes() == same.read_bytes()
        assert 10_000 < path.stat().st_size < largest
    return first


def each(pages):
    # That of the interface is made of docstrings, which are tested.
    pages = [page for page in pages if page.name != "api.md"]
    names = [f"{page.parent.name}-{page.name}" for page in pages]
    return pytest.mark.parametrize("page", pages, ids=names)


@pytest.mark.slow
@each(PAGES)
def test_code_on_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page.parent.name == "saved_models":
        shutil.copytree(page.parent, "saved_models")
    given = {*tmp_path.glob("saved_models/*")}
    run(page.read_text(), page.name)
    assert {*tmp_path.glob("saved_models/*")} == given  # make examples alone adds to it


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


def anchors(page):
    """The places on a page that a link can name, as GitHub makes them of headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    found = []
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        # The second of a name is name-1.
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return found


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\s?\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(path), f"{page.name}: {target}"


def test_interface_page_is_that_of_the_docstrings(tmp_path):
    pytest.importorskip("griffe2md")
    write_api = load("write_api")
    write_api.write(tmp_path)
    assert (tmp_path / "api.md").read_text() == (ROOT / "docs/api.md").read_text(), (
        "run: make docs"
    )
    public = sum(list(write_api.PARTS.values())[:3], [])
    assert {name.rpartition(".")[2] for name in public} == set(keras_bptt.__all__)
    # Every example is a block, and all are there.
    text = (tmp_path / "api.md").read_text()
    assert text.count(">>> ") == sum(
        block.count(">>> ") for block in re.findall(r"```pycon\n(.*?)```", text, re.S)
    )
    assert "````" not in text and "truncation=None" in text and "use_bias=True" in text


@pytest.mark.slow
def test_every_figure_is_drawn_again(tmp_path):
    """By `make docs`, and the tables are filled as they are."""
    pytest.importorskip("griffe2md")
    code = f"import pathlib, build; build.main(pathlib.Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "docs", check=True)
    tracked = subprocess.run(
        ["git", "ls-files", "*.png"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    drawn = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")}
    assert drawn == set(tracked) and len(drawn) >= 15
    assert all((tmp_path / name).stat().st_size > 10_000 for name in drawn)
    for page in ("README.md", "examples/README.md", "docs/own_cells.md"):
        written = (tmp_path / page).read_text()
        assert written == (ROOT / page).read_text(), "run: make docs"


def test_the_first_page_says_what_was_measured(tmp_path):
    """The README's chart and the numbers beside it are those of docs/performance/*.json."""
    pytest.importorskip("matplotlib")
    draw_readme = load("draw_readme")
    page = (ROOT / "README.md").read_text()
    assert f"\n{draw_readme.sentences()}\n" in page, "run: make docs"
    (first,) = check_drawn(draw_readme.draw_all, tmp_path, 200_000)
    assert f"(docs/performance/{first.name})" in page


QUOTE = re.compile(r"^```python (\w+\.py)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@each([page for page in PROSE if QUOTE.search(page.read_text())])
def test_quoted_lines_are_in_the_source(page):
    for name, quote in QUOTE.findall(page.read_text()):
        source = (ROOT / "keras_bptt" / name).read_text().splitlines()
        lines = {line.strip() for line in source}
        for line in filter(None, map(str.strip, quote.splitlines())):
            assert line in lines, f"{page.name}: not a line of {name}: {line}"


PROMPTS = re.compile(r"^```pycon\n(.*?)^```", re.DOTALL | re.MULTILINE)


@each([page for page in PROSE if PROMPTS.search(page.read_text())])
def test_shown_numbers_come_out(page):
    pieces = PROMPTS.split(page.read_text())
    # Every other piece has prompts. Of the rest the line breaks, that of the opening fence
    # included, so that a failure names its line of the page.
    prompts = "".join(
        piece if number % 2 else "\n" * (piece.count("\n") + 1)
        for number, piece in enumerate(pieces)
    )
    test = doctest.DocTestParser().get_doctest(
        prompts, {"__name__": "__main__"}, page.name, str(page), 0
    )
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS  # as in setup.cfg
    report = []
    with np.printoptions():  # a page may set others
        doctest.DocTestRunner(optionflags=flags).run(test, out=report.append)
    assert not report, "".join(report)


@pytest.fixture(scope="module")
def draw_bptt():
    pytest.importorskip("matplotlib")
    return load("draw_bptt")


def test_figures_of_the_derivation_are_drawn(draw_bptt, tmp_path):
    first = check_drawn(draw_bptt.draw_all, tmp_path)
    shown = re.findall(r"\]\(bptt/(\w+\.png)\)", (ROOT / "docs/bptt.md").read_text())
    assert sorted(path.name for path in first) == sorted(shown)
    for path in first:
        assert (ROOT / "docs" / "bptt" / path.name).stat().st_size < 150_000


def test_figures_of_the_gates_are_drawn(tmp_path):
    """From the numbers that were measured; no network is trained."""
    pytest.importorskip("matplotlib")
    numbers = json.loads((ROOT / "docs/gated/gradient.json").read_text())
    first = check_drawn(
        functools.partial(load("draw_gated").draw_all, numbers), tmp_path
    )
    shown = re.findall(r"\]\(gated/(\w+\.png)\)", (ROOT / "docs/gated.md").read_text())
    assert sorted(path.name for path in first) == sorted(shown)


def test_the_architecture_names_what_is_there(tmp_path):
    """The page and its figure: modules that exist, and every option of the layer."""
    page = (ROOT / "docs/architecture.md").read_text()
    figure = load("draw_architecture")
    modules = re.findall(r"`((?:\w+/)*\w+\.py)`", page)
    modules += [
        f"{name}.py" for *_, names in figure.OPTIONS for name in names.split(", ")
    ]
    modules += [f"{note}.py" for *_, note in figure.BOXES.values() if "/" in note]
    assert len(modules) > 20
    missing = [m for m in modules if not (ROOT / "keras_bptt" / m).exists()]
    assert not missing
    own = set(inspect.signature(keras_bptt.BPTTRNN).parameters)
    own -= set(inspect.signature(keras.layers.SimpleRNN).parameters)
    unsaid = [option for option in own if f"`{option}`" not in page]
    assert unsaid == ["output_activation"]
    check_drawn(figure.draw_all, tmp_path)


def test_what_the_figures_of_the_derivation_show(draw_bptt):
    right, nested, literal = draw_bptt.count_paths(4).values()
    np.testing.assert_array_equal(right, np.tril(np.ones((4, 4))))
    np.testing.assert_array_equal(nested, right)
    expected = [[1, 0, 0, 0], [2, 1, 0, 0], [3, 2, 1, 0], [4, 3, 2, 1]]
    np.testing.assert_array_equal(literal, expected)
    for gain in (0.5, 1.5):
        norms = draw_bptt.norms_by_distance(gain, 0.5, timesteps=6)
        assert len(norms) == 7 and norms[0] == pytest.approx(1)
        assert (norms[1:] < gain ** np.arange(1, 7)).all()
    # Where the slope is 1 the bound is reached.
    norms = draw_bptt.norms_by_distance(1.5, 1e-9, timesteps=6)
    np.testing.assert_allclose(norms, 1.5 ** np.arange(7))
