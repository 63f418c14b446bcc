"""The chart and the sentences of the README: a training step beside its peers.

    python docs/draw_readme.py           # prints the sentences; a second, needs matplotlib
    python docs/build.py                 # draws the chart, writes the sentences (make docs)

Measures nothing: every number comes out of the JSON files in `docs/performance/`, which
`make bench` writes. `SimpleRNN` appears in the better of its two forms, TensorFlow's graph
and XLA: the faster one in a chart of time, the one of less memory in a chart of memory.
"""

import json
import pathlib
import statistics

from matplotlib.figure import Figure

NUMBERS = pathlib.Path(__file__).parent / "performance"
BLUE, LIGHT_BLUE, GREY = "#0072B2", "#56B4E9", "#B0B0B0"
OWN = "BPTTRNN"
SIMPLE = ("SimpleRNN, graph", "SimpleRNN, XLA")
# Of each row of the chart: its forms in the benchmarks.
CONTESTANTS = {
    OWN: (OWN,),
    "SimpleRNN": SIMPLE,
    "torch.nn.RNN": ("torch.nn.RNN",),
    "JAX scan": ("JAX scan",),
}
# Title, benchmark, (B, T, D, H); with an output at every step.
TIMES = [
    ("medium", "training_step", (32, 128, 64, 128)),
    ("many units", "training_step", (128, 100, 128, 512)),
    ("many steps", "training_step", (8, 2048, 64, 256)),
    ("one example", "training_step", (1, 1000, 32, 64)),
    ("few units", "scaling", (32, 128, 32, 64)),
]
CHECKPOINTS = 'BPTTRNN,\ncheckpoint_every="sqrt"'
MEMORIES = (CHECKPOINTS, OWN, "SimpleRNN")


def results(name):
    return json.loads((NUMBERS / f"{name}.json").read_text())["results"]


def shape_of(case):
    return case["batch"], case["timesteps"], case["features"], case["units"]


def times(result):
    """Milliseconds of each contestant of a case, of its faster form."""
    ms = {name: value["median"] for name, value in result["ms"].items()}
    found = {
        name: [ms[form] for form in forms if form in ms]
        for name, forms in CONTESTANTS.items()
    }
    return {name: min(values) for name, values in found.items() if values}


def times_of(benchmark, shape):
    for result in results(benchmark):
        plain = not result["case"]["masked"] and not result["case"]["dropout"]
        if shape_of(result["case"]) == shape and result["case"]["sequences"] and plain:
            return times(result)
    raise KeyError(f"{benchmark}.json has no case {shape}")


def rows(name):
    """Seconds and megabytes of a benchmark of checkpoints, by the name of its rows."""
    return {row["name"]: row for row in results(name)["rows"]}


def memory(sequences, timesteps):
    """Megabytes of a step of `timesteps` steps, over those of the same program at T = 8."""
    found = {
        result["name"]: result["growth_mb"][str(timesteps)]
        for result in results("memory")
        if result["sequences"] == sequences
    }
    return {OWN: found[OWN], "SimpleRNN": min(found[form] for form in SIMPLE)}


def memories():
    """Title and megabytes of each panel."""
    long, dense = rows("checkpoints_long"), rows("output_layer")
    mb = {name: row["growth_mb"] for name, row in long.items()}
    without_dense = {
        CHECKPOINTS: dense["output_units, c = sqrt"]["growth_mb"],
        OWN: dense["BPTTRNN and Dense"]["growth_mb"],
        "SimpleRNN": dense["SimpleRNN and Dense"]["growth_mb"],
    }
    last = {
        CHECKPOINTS: mb["c = sqrt"],
        OWN: mb["every state kept"],
        "SimpleRNN": min(mb[form] for form in SIMPLE),
    }
    return [
        ("output at every step\n32, 2000, 32, 128", memory(True, 2000)),
        ("last output alone\n32, 2000, 32, 128", memory(False, 2000)),
        ("last output alone\n8, 100000, 4, 128", last),
        ("a Dense at every step\n8, 20000, 8, 512", without_dense),
    ]


def draw():
    figure = Figure(figsize=(9.6, 4.7), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    every = [
        (f"{title}\n{', '.join(map(str, shape))}", times_of(benchmark, shape))
        for title, benchmark, shape in TIMES
    ]
    _draw_panels(upper, "Time of a training step, ms", CONTESTANTS, every)
    _draw_panels(lower, "Memory of a training step, MB", MEMORIES, memories())
    figure.text(
        *(0.99, 0.995),
        "shorter is better; in each title: examples, timesteps, features, units",
        **{"fontsize": 9, "color": "dimgrey", "ha": "right", "va": "top"},
    )
    return figure


def _draw_panels(figure, title, names, panels):
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")
    for axes, (case, values) in zip(
        figure.subplots(1, len(panels), sharey=True), panels, strict=True
    ):
        for place, name in enumerate(names):
            _draw_bar(axes, place, name, values)
        axes.set_title(case, fontsize=9)
        axes.set_xlim(0, 1.35 * max(values.values()))
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[["top", "right", "bottom"]].set_visible(False)


def _draw_bar(axes, place, name, values):
    if name not in values:
        axes.text(0, place, " not measured", fontsize=8, color="grey", va="center")
        return
    color = {OWN: BLUE, CHECKPOINTS: LIGHT_BLUE}.get(name, GREY)
    axes.barh(place, values[name], 0.7, color=color)
    weight = "bold" if values[name] == min(values.values()) else "normal"
    text = f" {number(values[name])}"
    axes.text(values[name], place, text, fontsize=9, va="center", weight=weight)


def number(value):
    """Two digits at least, and no more than the benchmarks can tell."""
    return f"{value:.2f}" if value < 1 else f"{value:,.{int(value < 9.95)}f}"


def sentences():
    """What the README says of the chart, in Markdown."""
    return f"{_on_time()}\n{_on_gates()}\n{_on_memory()}"


def _on_gates():
    """Of the layers with gates: by lower quartiles, as their benchmark has it."""
    ratios = {}
    for result in results("gated"):
        layer = result["case"]["layer"]
        low = {name: value["quartiles"][0] for name, value in result["ms"].items()}
        forms = {
            f"Keras' `{layer}`": (f"{layer}, graph", f"{layer}, XLA"),
            f"`torch.nn.{layer}`": (f"torch.nn.{layer}",),
            "a JAX scan": ("JAX scan",),
        }
        for name, names in forms.items():
            best = min(low[form] for form in names)
            of_layer = ratios.setdefault(f"BPTT{layer}", {})
            of_layer.setdefault(name, []).append(best / low[f"BPTT{layer}"])
    lines = []
    for ours, others in ratios.items():
        (host, first), *more = [
            (name, f"{number(min(found))} to {number(max(found))} times")
            for name, found in others.items()
        ]
        said = "".join(f", {name} {times}" for name, times in more)
        cases = f"{len(others[host])} cases"
        lines.append(f"  {host} takes {first} as long as `{ours}`\n  ({cases}){said}.")
    return "\n".join(lines)


def _on_time():
    measured = [
        (shape_of(result["case"]), times(result))
        for benchmark in ("training_step", "scaling")
        for result in results(benchmark)
    ]

    ratios = {
        name: [(ms[name] / ms[OWN], shape) for shape, ms in measured if name in ms]
        for name in CONTESTANTS
    }

    def said(name):
        values = [ratio for ratio, _ in ratios[name]]
        found = min(values), max(values), statistics.median(values)
        low, high, middle = map(number, found)
        cases = f"{len(values)} cases, median {middle}"
        return f"{low} to {high} times as long as `BPTTRNN` ({cases})"

    losses = {
        name: [shape for ratio, shape in found if ratio < 1]
        for name, found in ratios.items()
    }
    others = [name for name in CONTESTANTS if losses[name]]
    if others != ["JAX scan"]:
        raise ValueError(f"The README says that JAX alone is ever faster, not {others}")
    shapes = " and ".join(map(str, losses["JAX scan"]))
    return f"""\
- **Time.** `SimpleRNN` takes {said("SimpleRNN")}.
  `torch.nn.RNN` takes {said("torch.nn.RNN")}.
  A JAX scan takes {said("JAX scan")}. It is
  faster than `BPTTRNN` in {len(losses["JAX scan"])} of them, {shapes}."""


def _on_memory():
    long, last = rows("checkpoints_long"), memory(False, 2000)

    def said(name):
        row = long[name]
        return f"{number(row['growth_mb'])} MB and {number(row['seconds'])} s"

    graph, xla = map(said, SIMPLE)
    return f"""\
- **Memory.** A training step through 100,000 timesteps takes
  {said("every state kept")} by default, and {said("c = sqrt")} with
  `checkpoint_every="sqrt"`. `SimpleRNN` takes {graph} as a graph, and
  {xla} under XLA. For the last output of 2,000 timesteps `SimpleRNN`
  needs less than `BPTTRNN`: {number(last["SimpleRNN"])} MB, not {number(last[OWN])} MB.
  The memory of PyTorch and of JAX was not measured."""


def draw_all(folder):
    """Returns the path of the chart."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "at_a_glance.png"
    draw().savefig(path, dpi=110, metadata={"Software": None})
    return path


if __name__ == "__main__":
    print(sentences())
