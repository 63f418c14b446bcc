"""Writes api.md, the reference of all public names, from the docstrings.

    python docs/write_api.py

griffe reads the sources, griffe2md makes Markdown of them. What they do not know of is put
right here: examples that are doctests, call arguments, and the anchors of GitHub.
"""

import logging
import pathlib
import re

import griffe
from griffe2md import render_object_docs

FOLDER = pathlib.Path(__file__).parent
# What a user needs first comes first.
PARTS = {
    "The layers": [
        "BPTTRNN",
        "BPTTLSTM",
        "BPTTGRU",
        "LSTMMemoryBias",
        "GRUMemoryBias",
        "BPTT",
        "Truncation",
        "RandomizedTruncation",
        "convert",
    ],
    "The gradient flow": [
        "flow.gradient_flow.gradient_flow",
        "GradientFlow",
        "LayerFlow",
    ],
    "Callbacks": ["GradientFlowLogger", "AdaptiveTruncation"],
    "The equations in NumPy: keras_bptt.reference": [
        "reference.Network",
        "reference.Forward",
        "reference.Gradients",
        "reference.HiddenGradients",
        "reference.forward",
        "reference.gradients",
        "reference.hidden_gradients",
        "reference.nested_product_gradients",
        "reference.literal_reading_gradients",
        "reference.central_differences",
    ],
    "LSTM and GRU: keras_bptt.reference": [
        "reference.LSTMForward",
        "reference.LSTMGradients",
        "reference.lstm_forward",
        "reference.lstm_gradients",
        "reference.GRUForward",
        "reference.GRUGradients",
        "reference.gru_forward",
        "reference.gru_gradients",
    ],
    "Truncated and clipped: keras_bptt.reference": [
        "reference.truncated_gradients",
        "reference.clipped_gradients",
    ],
}
OPTIONS = {
    "heading_level": 3,
    "inherited_members": False,
    "show_if_no_docstring": False,
    "show_bases": False,
    "show_root_full_path": False,
    "show_object_full_path": False,
    "summary": False,
    # Their arguments are those of the class.
    "filters": ["!^_", "!^(get_config|from_config)$"],
}
INTRODUCTION = """# The interface

All public names, from their docstrings, which `help` shows too. `make doctest` runs the
examples, `python docs/write_api.py` writes this page, and a test finds it out of date.
"""


def prepare(thing):
    """Make Markdown of what griffe would take for text, in all docstrings of a thing."""
    if thing.docstring:
        text = thing.docstring.value + "\n"
        # An example is a paragraph that begins with >>>.
        text = re.sub(
            r"^( *)(>>> (?:.+\n?)+)", r"\1```pycon\n\1\2\1```\n", text, flags=re.M
        )
        # A section that griffe knows; `page_of` gives it its name back.
        thing.docstring.value = text.replace("Call arguments:", "Other Parameters:")
    for member in thing.members.values():
        if not member.is_alias:
            prepare(member)


def github_anchor(heading):
    """How GitHub names the place of a heading: lower case, no punctuation, hyphens."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def page_of(name, package):
    """The part of the page on one name."""
    thing = package[name]
    prepare(thing)
    text = render_object_docs(thing, OPTIONS, format_md=True)
    text = text.replace("**Other Parameters:**", "**Call arguments:**")
    text = re.sub(r"^(#+ `)keras_bptt\.", r"\1", text, flags=re.M)
    # Sections that griffe does not know come folded.
    return re.sub(
        r"<details .*?>\n<summary>(.*?)</summary>\n\n(.*?)\n\n</details>",
        r"**\1:**\n\n\2",
        text,
        flags=re.S,
    )


def with_links(page):
    """Links by GitHub's anchors; text in place of those that lead nowhere."""
    headings = re.findall(r"^#+ `?(.*?)`?$", page, re.M)
    anchors = {heading: github_anchor(heading) for heading in headings}

    def link(match):
        text, target = match.groups()
        name = target.rpartition(".")[2]
        return f"[{text}](#{anchors[name]})" if name in anchors else text

    return re.sub(r"\[([^\]]*)\]\(#([^)]*)\)", link, page)


def write(folder=FOLDER):
    """Writes api.md into the folder."""
    logging.getLogger("griffe").setLevel(logging.ERROR)  # types may be left out
    package = griffe.load("keras_bptt", docstring_parser="google", resolve_aliases=True)
    # The source says *args and **kwargs for what is SimpleRNN's; the stub writes it out.
    module = package["layers.bptt_rnn"]
    stub = module.filepath.with_suffix(".pyi")
    stub = griffe.visit("bptt_rnn", stub, stub.read_text())["BPTTRNN.__init__"]
    module["BPTTRNN.__init__"].parameters = stub.parameters
    # What it has from there is its own to a reader.
    options = package["layers.options.GradientOptions"].members
    for name in [name for name, member in options.items() if member.is_attribute]:
        module["BPTTRNN"].set_member(name, options[name])
    page = INTRODUCTION
    for title, names in PARTS.items():
        page += f"\n## {title}\n"
        for name in names:
            page += "\n" + page_of(name, package)
    (folder / "api.md").write_text(with_links(page), encoding="utf-8")


if __name__ == "__main__":
    write()
