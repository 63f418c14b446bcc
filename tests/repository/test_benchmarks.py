"""The benchmarks measure what they say, and refuse contestants that disagree."""

import argparse
import subprocess
from unittest import mock

import checkpointing
import contestants
import memory
import numpy as np
import pytest
import report
import timing
import training_step
import truncation
from contestants import Case
from helpers import few

SMALL = (3, 6, 2, 4)
NAMES = ["BPTTRNN", "SimpleRNN, graph"]


@pytest.mark.parametrize(
    "options",
    few(
        [({},), ({"masked": True},), ({"dropout": 0.3},)],
        lambda options: "masked" in options,
    ),
)
def test_a_row_of_the_table(options):
    case = Case(*SMALL, **options)
    result = training_step.measure(case, 0, NAMES)
    assert result["largest_relative_difference"] < contestants.TOLERANCE
    assert list(result["ms"]) == NAMES
    assert all(ms["median"] > 0 for ms in result["ms"].values())
    row = training_step.table([result]).splitlines()[-1]
    assert str(SMALL) in row
    assert row.count("–") == len(contestants.CONTESTANTS) - 2 + 1  # and the quartiles'


def wrong(make):
    """A contestant whose gradients are a thousandth too long."""

    def contestant(case, data):
        step = make(case, data)
        return lambda: [gradient * 1.001 for gradient in step()]

    return contestant


def test_a_wrong_contestant_is_refused(monkeypatch):
    make = contestants.keras_step(contestants.BPTTRNN)
    monkeypatch.setitem(contestants.CONTESTANTS, "wrong", wrong(make))
    with pytest.raises(SystemExit, match="wrong differs from SimpleRNN, graph"):
        contestants.contestants(Case(*SMALL), [*NAMES, "wrong"])
    make = checkpointing.LAST[checkpointing.STORED]
    monkeypatch.setitem(checkpointing.LAST, "wrong", wrong(make))
    with pytest.raises(SystemExit, match="wrong differs from every state kept"):
        case = Case(*SMALL, sequences=False)
        checkpointing.agreeing([checkpointing.STORED, "wrong"], case)


def test_a_missing_contestant_is_a_line(monkeypatch):
    peer = mock.Mock(side_effect=ImportError("No module named 'peer'"))
    monkeypatch.setitem(contestants.CONTESTANTS, "peer", peer)
    steps, lines, _ = contestants.contestants(Case(*SMALL), [*NAMES, "peer"])
    assert list(steps) == NAMES
    assert lines == ["peer: not measured, No module named 'peer'"]


def test_the_masked_problem_has_padded_examples():
    mask = contestants.problem(Case(20, 10, 2, 3, masked=True))["mask"]
    assert np.all(mask[:, 0]) and not np.all(mask)


def test_the_limit_counts_multiply_adds():
    """By hand: x W, x^T delta: D H each; h U, delta U^T, h^T delta: H H each."""
    case = Case(3, 5, 2, 4)
    assert case.multiply_adds == 3 * 5 * (2 * 2 * 4 + 3 * 4 * 4)
    assert timing.limit(2.0, timing.SIDE**3 // 2) == 1.0


def test_every_function_is_timed_every_round():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = timing.interleaved(functions, 0, rounds=3)
    assert calls == list("aabb" * 3)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_the_page_has_a_place_for_every_table():
    page = report.PAGE.read_text(encoding="utf-8")
    for name, (_, table, _) in report.BENCHMARKS.items():
        if table is not None:
            assert "\nTABLE\n<!-- end" in report.filled(page, name, "TABLE")
    with pytest.raises(SystemExit, match="one pair of comments"):
        report.filled(page, "nothing", "TABLE")


@pytest.mark.slow
def test_memory_grows_by_what_is_kept():
    """h and x, of a hundred steps, in a process of its own."""
    peak = memory.peak_of_a_process("BPTTRNN", False, 16)
    assert peak > 100
    assert memory.data_mb(True, 2**20 // (32 * 4)) == (32.0 + 128.0, 128.0)


@pytest.mark.parametrize("text", ["1,2,3", "a", "1,2,3,0"])
def test_wrong_shapes(text):

    with pytest.raises(argparse.ArgumentTypeError, match="B,T,D,H"):
        training_step.parse_shape(text)


@pytest.fixture
def at_once(monkeypatch):
    """Processes that take 7 s and 3 MB a timestep, or fail; returns their calls."""
    calls = []

    def numbers(name, *case, script, limit):
        calls.append((name, case[1], limit))
        if name == "SimpleRNN, XLA" and case[1] > memory.SHORT:
            raise subprocess.TimeoutExpired(name, limit)
        if name == "c = 2":
            raise SystemExit("killed")
        return [7.0, 3.0 * case[1]]

    monkeypatch.setattr(memory, "numbers_of_a_process", numbers)
    return calls


@pytest.mark.slow
def test_rows_of_checkpoints(at_once, tmp_path):
    case = Case(3, 9, 2, 4, sequences=False)
    names = [checkpointing.STORED, "c = 2", "c = 4", checkpointing.ROOT]
    results = checkpointing.curve(0, case, [*names, *checkpointing.SIMPLE])
    rows = {row["name"]: row for row in results["rows"]}
    failures = [row["failure"] for row in rows.values()]
    late = f"more than {checkpointing.LIMIT} s"
    assert failures == [None, "died", None, None, None, late]
    assert rows["c = 4"]["growth_mb"] == 3 * (9 - 8)
    assert rows["c = 4"]["ms"]["median"] > 0 and rows["c = 2"]["ms"] is None
    table = checkpointing.table_of_curve(results).splitlines()
    assert table[2].startswith("| every state kept | 1.00 | 3 |")
    assert table[3] == "| c = 2 | died | – |"
    assert table[7] == f"| SimpleRNN, XLA | {late} | – |"
    assert table[8].startswith("| *x alone*") and table[9].startswith("| *h alone*")
    pytest.importorskip("matplotlib").use("Agg")
    checkpointing.plot(results, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 0


@pytest.mark.slow
def test_rows_of_an_output_layer(at_once):
    case = Case(*SMALL)
    results = checkpointing.output_layer(case)
    names = list(checkpointing.WITH_OUTPUT_LAYER)
    assert [name for name, *_ in at_once] == [n for n in names for _ in range(2)] * 2
    assert "| SimpleRNN and Dense | 7.00 | -6 |" in checkpointing.table(results)
    # x and targets of 3 x 6 x (2 + 8) numbers, and h.
    data, states = checkpointing.alone(case).values()
    assert data == pytest.approx(720 / 2**20) and states == pytest.approx(288 / 2**20)


@pytest.mark.slow
def test_a_failure_is_left_alone(at_once):
    case = Case(3, 9, 2, 4, sequences=False)
    results = checkpointing.long(case)
    xla = [call for call in at_once if call[0] == "SimpleRNN, XLA"]
    assert [steps for _, steps, _ in xla] == [8, 9]  # and not in the second run
    given_up = f"| SimpleRNN, XLA | more than {checkpointing.LIMIT} s | – |"
    assert given_up in checkpointing.table(results)


@pytest.mark.slow
def test_a_process_measures_time_and_memory():
    def numbers(limit):
        arguments = checkpointing.ROOT, *SMALL, False
        script = checkpointing.__file__
        return memory.numbers_of_a_process(*arguments, script=script, limit=limit)

    seconds, mb = numbers(300)
    assert 0 < seconds < 100 < mb
    with pytest.raises(subprocess.TimeoutExpired):
        numbers(0.1)


@pytest.mark.slow
def test_rows_of_truncation():
    case = Case(*SMALL)
    (result,) = results = truncation.speed(0, [(case, 4)])
    assert set(result["ms"]) == {*truncation.policies(4), "forward"}
    assert str(SMALL) in truncation.table_of_speed(results).splitlines()[-1]
    rows = truncation.backward(0, (case, 4))
    assert [row["jit_compile"] for row in rows] == ["auto", False]
    assert "| 4 |" in truncation.table_of_backward(rows)
