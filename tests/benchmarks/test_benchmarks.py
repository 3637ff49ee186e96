"""The parts of the benchmarks that need no GPU, and `forward`, `backward` and `training` as a whole, with the CPU backend."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

import cce_numba as cce
import reference

pytest.importorskip("cupy", reason="the benchmarks import CuPy")
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
cublas, exact, exact_gradients, inputs, kernel_times, readme_table, record, timing = map(
    importlib.import_module,
    ("cublas", "exact", "exact_gradients", "inputs", "kernel_times", "readme_table", "record", "timing"),
)
backward, backward_tables, forward, forward_tables = map(
    importlib.import_module, ("backward", "backward_tables", "forward", "forward_tables")
)
sys.path.pop()

EPS = 2.0**-5  # at which few of 1000 columns survive


class NumpyAsCupy:
    """NumPy, with the one thing more that is asked of CuPy."""

    def __getattr__(self, name):
        return getattr(np, name)

    def get_default_memory_pool(self):
        return SimpleNamespace(free_all_blocks=lambda: None)


@pytest.fixture
def archive(tmp_path):
    """The file of a last layer with 60 entries of size 8, and 30 tokens."""
    rng = np.random.default_rng(0)
    arrays = {
        "classifier_q": rng.integers(-8, 8, (60, 2, 4), np.int8),
        "classifier_scale": rng.uniform(0.05, 0.1, (60, 2)).astype(np.float16),
        "embeddings_bf16": (rng.standard_normal((30, 8)) + 1).astype(ml_dtypes.bfloat16).view(np.uint16),
        "targets": rng.integers(0, 60, 30, np.int32),
        "loss_fp32": np.zeros(30, np.float32),
    }
    np.savez(tmp_path / "layer.npz", **arrays)
    return str(tmp_path / "layer.npz")


@pytest.fixture
def clock(monkeypatch):
    """What the device has done, in ms: a call adds what it takes."""
    clock = SimpleNamespace(ms=0.0)
    monkeypatch.setattr(timing, "mark", lambda: clock.ms)
    monkeypatch.setattr(timing, "elapsed_ms", lambda start, stop: stop - start)
    monkeypatch.setattr(timing, "wait", lambda: None)
    return clock


def test_interleaved_calls_take_turns_and_each_is_charged_its_own_time(clock):
    order = []

    def call(name, ms):
        order.append(name)
        clock.ms += ms * len(order)  # slower and slower

    calls = {"a": lambda: call("a", 1), "b": lambda: call("b", 10)}
    times = timing.interleaved(calls, rounds=2, burst=2)
    assert "".join(order) == "ab" + "aabb" * 2
    assert times == {"a": [(3 + 4) / 2, (7 + 8) / 2], "b": [10 * (5 + 6) / 2, 10 * (9 + 10) / 2]}


def test_ratios_are_those_of_each_round():
    """A clock that halves in the second half of the rounds does not show."""
    floor = np.array([1.0] * 5 + [2.0] * 6)
    found = timing.ratios(list(floor * np.linspace(1.0, 2.0, 11)), list(floor))
    assert found == {"median": 1.5, "p10": 1.1, "p90": 1.9}


@pytest.mark.parametrize(
    ("N", "V", "widths"),
    [
        (8192, 256_000, [128_000] * 2),
        (8192, 131_072, [131_072]),
        (16_384, 151_936, [75_968] * 2),
        (1, 1, [1]),
        (20_000, 100_001, [50_008, 49_993]),
    ],
)
def test_parts_of_the_product(N, V, widths):
    parts = cublas.parts_of(N, V)
    assert [min(part.stop, V) - part.start for part in parts] == widths
    assert [part.start for part in parts] == [0, *np.cumsum(widths)[:-1]]
    assert max(widths) * N * 2 <= 3e9


def test_allowed_bytes():
    assert forward.allowed_bytes(8192, 256_000, bits=False) == 2**20 + 12 * 8192
    assert forward.allowed_bytes(8192, 256_000, bits=True) == 2**20 + 12 * 8192 + 64 * 32_000
    assert forward.allowed_bytes(129, 9, bits=True) == 2**20 + 12 * 129 + 2 * 2


def test_random_inputs(monkeypatch):
    monkeypatch.setattr(inputs, "_ROWS", 100)
    e, c, targets = inputs.random(300, 250, 64, np)
    assert (e.shape, c.shape, targets.shape) == ((300, 64), (250, 64), (300,))
    assert e.dtype == c.dtype == ml_dtypes.bfloat16
    logits = e.astype(np.float64) @ c.astype(np.float64).T
    assert logits.std() == pytest.approx(2, rel=0.02)
    assert len(np.unique(e[:, 0].astype(np.float64))) > 200  # no part is the one before once more
    assert targets.max() < 250


def test_real_inputs_keep_the_logits_and_lower_those_of_copies(archive, monkeypatch):
    monkeypatch.setattr(inputs, "_ROWS", 50)
    source = inputs.read(archive)
    e, c, targets = inputs.real(source, 70, 150, 24, np)
    assert (e.shape, c.shape, targets.dtype) == ((70, 24), (150, 24), np.int64)
    assert np.array_equal(targets, np.tile(source.targets, 3)[:70])
    exact_logits, logits = source.e @ source.c.T, e.astype(np.float32) @ c.astype(np.float32).T
    magnitude = np.linalg.norm(source.e, axis=1)[:, None] * np.linalg.norm(source.c, axis=1)
    for repeat in (logits[:30, :60], logits[30:60, :60]):
        assert np.all(abs(repeat - exact_logits) <= 2**-7 * magnitude)  # two roundings to bfloat16
    lowered = logits[:30, :60].mean(axis=0) - logits[:30, 60:120].mean(axis=0)
    np.testing.assert_allclose(lowered, inputs.NATS_PER_COPY, atol=0.1)
    lowered = logits[:30, :30].mean(axis=0) - logits[:30, 120:].mean(axis=0)
    np.testing.assert_allclose(lowered, 2 * inputs.NATS_PER_COPY, atol=0.1)


def test_an_archive_is_only_extended(archive):
    source = inputs.read(archive)
    assert source.why_not(60, 8) is None
    assert source.why_not(59, 8) == source.why_not(60, 7) == "V must be at least 60 and D at least 8"


@pytest.fixture
def computed():
    """`(exact, result)` of 300 tokens: blocks 0 and 2 are looked at, and some tokens of block 1."""
    e, c, targets = inputs.random(300, 1000, 32, np)
    return exact.compute(e, c, targets, 128), cce.forward(e, c, targets, filter_eps=EPS)


def test_what_is_right_passes(computed, monkeypatch):
    expected, result = computed
    assert exact.check(expected, lse=result.lse, target_logit=result.target_logit)["lse"] < 1
    shares = exact.check_survivors(expected, result, EPS)
    assert 0.05 < shares["surviving"] <= shares["flagged"] < 1
    monkeypatch.setattr(exact, "_NUMBERS", 32 * 77)  # several parts of the vocabulary, the last one smaller
    e, c, targets = inputs.random(300, 1000, 32, np)
    np.testing.assert_allclose(exact.compute(e, c, targets, 128).lse, expected.lse, rtol=1e-12)


@pytest.mark.parametrize("wrong", [1e-3, np.nan])
@pytest.mark.parametrize("name", ["lse", "target_logit"])
@pytest.mark.parametrize("token", [0, 127, 256, 299])
def test_a_wrong_token_does_not_pass(computed, name, token, wrong):
    expected, result = computed
    values = getattr(result, name).copy()
    values[token] += wrong
    with pytest.raises(AssertionError, match=name):
        exact.check(expected, **{name: values})


@pytest.mark.parametrize("block", [0, 2])
def test_a_missed_survivor_does_not_pass(computed, block):
    expected, result = computed
    target = int(expected.targets[expected.tokens // 128 == block][0])
    survivors = result._statistics.survivors.copy()
    survivors[block, target // 8] &= ~np.uint8(1 << target % 8)
    missing = dataclasses.replace(result, _statistics=dataclasses.replace(result._statistics, survivors=survivors))
    with pytest.raises(AssertionError, match=f"1 columns missed in block {block}, the first is {target}"):
        exact.check_survivors(expected, missing, EPS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "8", "0", "8"], "at least 1"),
        (["--burst", "0"], "at least 1"),
        (["--quick", "--shape", "8", "8", "8"], "not allowed with"),
        (["--real", "absent.npz"], "No such file"),
        (["--real", "ARCHIVE", "--shape", "8", "59", "8"], "cannot be extended to 8 x 59 x 8: V must be at least 60"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message, archive, capsys):
    with pytest.raises(SystemExit):
        forward.parse([archive if argument == "ARCHIVE" else argument for argument in arguments])
    assert message in capsys.readouterr().err


def test_refuses_without_a_gpu_and_for_another_backend(monkeypatch):
    monkeypatch.setattr(forward.machine, "why_no_gpu", lambda: "there is none")
    with pytest.raises(SystemExit, match="forward: there is none"):
        forward.main([])
    with pytest.raises(SystemExit, match="'cpu' would run, not 'hopper': "):
        forward.require_hopper(*inputs.random(8, 8, 8, np))


@pytest.fixture
def without_gpu(monkeypatch, tmp_path):
    """`forward` and `backward` on NumPy arrays and the CPU backend; graphs cannot be captured."""

    def no_graph(call):
        raise RuntimeError("no graphs [here]")

    monkeypatch.setattr(forward.machine, "why_no_gpu", lambda: None)
    for module in (forward, backward):
        monkeypatch.setattr(module, "cupy", NumpyAsCupy())
    monkeypatch.setattr(forward, "require_hopper", lambda *arrays: None)
    monkeypatch.setattr(forward, "HOST_RUNS", 3)
    monkeypatch.setattr(forward, "QUICK_SHAPES", ((300, 1000, 32), (1100, 70, 8)))
    monkeypatch.setattr(backward, "QUICK_SHAPE", (300, 1000, 200))
    monkeypatch.setattr(cublas, "torch_with_cuda", lambda: None)
    monkeypatch.setattr(cublas, "product", lambda e, c: lambda: e.astype(np.float32) @ c.astype(np.float32).T)
    monkeypatch.setattr(timing, "mark", time.perf_counter)
    monkeypatch.setattr(timing, "elapsed_ms", lambda start, stop: 1e3 * (stop - start))
    monkeypatch.setattr(timing, "wait", lambda: None)
    monkeypatch.setattr(timing, "captured", no_graph)
    monkeypatch.setattr(record, "RESULTS", tmp_path)


@pytest.mark.usefixtures("without_gpu")
def test_forward_validates_times_shows_and_records(archive, tmp_path, capsys):
    forward.main(["--quick", "--real", archive, "--rounds", "2", "--record", "name"])
    out = capsys.readouterr().out
    for part in (
        "300 x 1000 x 32, random",
        "1100 x 70 x 8, real (layer.npz)",
        "no graphs [here]",
        "no PyTorch",
        "survivor bits",
    ):
        assert part in out
    assert "Random data alone" not in out
    written = json.loads((tmp_path / "name.json").read_text())
    assert written["surroundings"]["commit"]
    assert [problem["data"] for problem in written["problems"]] == ["random", "real (layer.npz)"] * 2
    assert written["host_us"]["CuPy"]["forward"]["median"] > 0
    for problem in written["problems"]:
        assert 0 < problem["survivors"]["surviving"] <= problem["survivors"]["flagged"] <= 1
        calls = problem["calls"]
        assert list(calls) == [forward.CUBLAS, forward.LOSS, forward.BITS]
        assert "x" not in calls[forward.CUBLAS]
        for name in (forward.LOSS, forward.BITS):
            assert calls[name]["x"]["p10"] <= calls[name]["x"]["median"] <= calls[name]["x"]["p90"]
            assert calls[name]["runs"] == 2
        assert ("no_graph" in problem) == (problem["N"] == 300)


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize(
    ("function", "spoil", "message"),
    [
        ("forward", lambda result: dataclasses.replace(result, lse=result.lse + 1), "lse: "),
        ("linear_cross_entropy", lambda found: (found[0], found[1] + 1), "lse: "),
        ("linear_cross_entropy", lambda found: (found[0] + 1, found[1]), "loss: "),
    ],
)
def test_nothing_is_timed_that_is_wrong(function, spoil, message, monkeypatch):
    right = getattr(cce, function)

    def wrong(*arrays, **options):
        found = right(*arrays, **options)
        return spoil(found) if options else found  # without options, it is the host's time that is measured

    wrong.__name__ = function
    monkeypatch.setattr(forward.cce, function, wrong)
    monkeypatch.setattr(timing, "interleaved", lambda *_: pytest.fail("timed"))
    with pytest.raises(AssertionError, match=message):
        forward.main(["--quick"])


def shown(table):
    console = Console(width=180)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_tables_mark_what_is_above_its_limit():
    def call(ratio, limit, size):
        times = {"median_ms": 2.0, "min_ms": 1.0, "max_ms": 3.0, "tflops": 500.0}
        x = {"median": ratio, "p10": ratio - 0.01, "p90": ratio + 0.01}
        return times | {"x": x, "x_at_most": limit, "extra_bytes": size, "extra_bytes_at_most": 2**20}

    problem = {"N": 1, "V": 2, "D": 3, "data": "random", "mean_loss": 1, "survivors": {"flagged": 0.5, "surviving": 0.25}}
    calls = {"good": call(1.1, 1.1, 2**20), "slow": call(1.101, 1.1, 0), "large": call(1.0, None, 2**21)}
    text = shown(forward_tables.problem_table([problem | {"calls": calls}]))
    lines = {name: next(line for line in text.splitlines() if name in line) for name in calls}
    assert "over" not in lines["good"]
    assert "over: 1.101" in lines["slow"]
    assert "over: 2.00" in lines["large"]
    us = {"median": 160.0, "p10": 150.0, "p90": 170.0}
    host = {"at_most": 150, "CuPy": {"linear_cross_entropy": us | {"median": 149.0}, "forward": us}}
    text = shown(forward_tables.host_table(host | {"PyTorch": host["CuPy"]}))
    assert text.count("over: 160 (150 - 170)") == 2
    assert text.count("149 (150 - 170)") == 2


@pytest.fixture
def small():
    """`(e, c, targets)` in bfloat16, and the reference's gradients of their mean loss."""
    e, c, targets = inputs.random(300, 1000, 32, np)
    return (e, c, targets), reference.backward(e, c, targets)


@pytest.mark.parametrize("logits", [1000 * 70, 1, 2**28])  # of 70 tokens, of one, of all
def test_exact_gradients_are_those_of_the_reference(small, logits, monkeypatch):
    monkeypatch.setattr(exact_gradients, "_LOGITS", logits)
    monkeypatch.setattr(exact_gradients, "_ROWS", 70)
    arrays, expected = small
    found = exact_gradients.compute(*arrays)
    assert found.loss == pytest.approx(float(reference.forward(*arrays).loss), rel=1e-6)
    for name, gradient in found.gradients.items():
        right = getattr(expected, name)
        assert gradient.dtype == np.float32
        assert np.linalg.norm(gradient - right) <= 1e-5 * np.linalg.norm(right)
        rounded = right.astype(ml_dtypes.bfloat16).astype(np.float64)
        rounding = np.linalg.norm(rounded - right) / np.linalg.norm(right)
        assert found.rounding[name] == pytest.approx(rounding, rel=0.01)
        assert 1e-3 < rounding < 2**-8


def test_gradients_are_not_judged_by_tf32(small, monkeypatch):
    monkeypatch.setenv("CUPY_TF32", "1")
    with pytest.raises(RuntimeError, match="CUPY_TF32"):
        exact_gradients.compute(*small[0])


def test_errors_and_zero_rows_of_gradients(monkeypatch):
    monkeypatch.setattr(exact_gradients, "_ROWS", 3)
    right = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)
    assert exact_gradients.error(right, right) == 0
    assert exact_gradients.error(1.5 * right, right) == pytest.approx(0.5)
    assert exact_gradients.error(0 * right, right) == 1
    wrong = right.copy()
    wrong[9, 3] += 1
    assert exact_gradients.error(wrong, right) == pytest.approx(1 / np.linalg.norm(right), rel=1e-5)
    wrong[9, 3] = np.nan
    assert np.isnan(exact_gradients.error(wrong, right))
    right[[0, 3, 9]], right[4, 1:] = 0, 0
    assert exact_gradients.zero_rows(right.astype(ml_dtypes.bfloat16)) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("arguments", "rows", "left_out"),
    [
        ([], [0, 2, 3, 4, 5, 7, 8], [1, 6, 9]),
        (["--real", "ARCHIVE"], range(10), []),
        (["--real", "ARCHIVE", "--rows", "2", "1"], [0, 1], []),
        (["--rows", "1", "frozen"], [0, 4, 5], []),
        (["--rows", "exact, calibrated"], [2], []),
        (["--rows", "default"], [0, 7], [1]),
    ],
)
def test_rows_are_chosen_by_number_and_name(arguments, rows, left_out, archive):
    found = backward.parse([archive if argument == "ARCHIVE" else argument for argument in arguments])
    assert found.rows == list(rows)
    assert found.left_out == left_out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "at least 1"),
        (["--rows", "11"], "there is no '11' among 1 default filter, calibrated; 2 "),
        (["--rows", "2"], "real data need --real"),
        (["--real", "absent.npz"], "No such file"),
    ],
)
def test_arguments_of_backward_that_do_not_fit(arguments, message, capsys):
    with pytest.raises(SystemExit):
        backward.parse(arguments)
    assert message in " ".join(capsys.readouterr().err.split())


def test_shapes_and_limits_of_rows(archive, monkeypatch):
    arguments = backward.parse(["--real", archive])
    assert backward.shape_of("calibrated", arguments) == (8192, 256_000, 2304)
    assert backward.shape_of("real", arguments) == (30, 60, 2304)
    arguments = backward.parse(["--real", archive, "--quick"])
    assert backward.shape_of("real", arguments) == (30, 60, backward.QUICK_SHAPE[2])
    rows = {(row.name, row.data): row for row in backward.ROWS}
    rounding = 1.7e-3
    for row, e_at_most, c_at_most in [
        (("default filter", "calibrated"), None, None),
        (("default filter", "real"), 5e-3, 3e-3),
        (("exact", "calibrated"), 3.4e-3, 3.4e-3),
        (("exact dC", "calibrated"), None, 3.4e-3),
    ]:
        assert rows[row].error_at_most("e", rounding) == e_at_most
        assert rows[row].error_at_most("c", rounding) == c_at_most
    monkeypatch.setattr(backward, "REAL_D", 7)
    with pytest.raises(SystemExit):
        backward.parse(["--real", archive])


@pytest.mark.usefixtures("without_gpu")
def test_backward_validates_times_shows_and_records(archive, tmp_path, capsys):
    backward.main(["--quick", "--real", archive, "--rounds", "2", "--profile", "--record", "name"])
    out = capsys.readouterr().out
    for part in (
        "300 x 1000 x 200, calibrated",
        "30 x 60 x 200, real",
        "no PyTorch with CUDA",
        "linear_cross_entropy_with_grad",
    ):
        assert part in out
    assert "wrong" not in out
    written = json.loads((tmp_path / "name.json").read_text())
    assert [data["data"] for data in written["data"]] == ["calibrated", "real", "random"]
    assert [row["number"] for row in written["rows"]] == list(range(1, 11))
    for row, spec in zip(written["rows"], backward.ROWS, strict=True):
        assert f"{row['number']} {spec.name}, {spec.data}: " in out
        assert (row["options"], row["wrt"]) == (spec.options, list(spec.wrt))
        assert row["x"]["p10"] <= row["x"]["median"] <= row["x"]["p90"]
        assert row["cublas"]["runs"] == row["call"]["runs"] == 2
        assert list(row["errors"]) == row["wrt"]
        assert all(error["rounding"] / 2 < error["error"] < 5e-3 for error in row["errors"].values())
        assert ("zero_rows" in row) == ("c" in row["wrt"])
        assert 0 < row["flagged"] <= 1
    exact_row = written["rows"][2]
    assert exact_row["flagged"] == 1
    assert all(error["error"] <= error["at_most"] for error in exact_row["errors"].values())
    assert readme_table.backward(written).count("\n") == 11


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda loss, grads: (loss + 1, grads), "the loss is"),
        (lambda loss, grads: (loss, dataclasses.replace(grads, e=np.zeros_like(grads.e))), "the error of dE is 1"),
        (lambda loss, grads: (loss, dataclasses.replace(grads, c=np.full_like(grads.c, np.nan))), "the error of dC is nan"),
        (lambda loss, grads: 1 / 0, "ZeroDivisionError: "),
    ],
)
def test_a_wrong_row_is_not_timed_and_the_others_are(spoil, message, monkeypatch, tmp_path, capsys):
    right = cce.linear_cross_entropy_with_grad

    def wrong(*arrays, **options):
        found = right(*arrays, **options)
        return spoil(*found) if "filter_eps" in options else found

    wrong.__name__ = right.__name__
    monkeypatch.setattr(backward.cce, right.__name__, wrong)
    with pytest.raises(SystemExit, match="wrong, and not timed: rows 3"):
        backward.main(["--quick", "--rows", "1", "3", "4", "--rounds", "1", "--record", "name"])
    assert message in capsys.readouterr().out
    rows = json.loads((tmp_path / "name.json").read_text())["rows"]
    assert ["x" in row for row in rows] == [True, False, True]
    assert readme_table.backward({"rows": rows}).count("\n") == 3


@pytest.mark.usefixtures("without_gpu")
def test_what_was_measured_before_an_interruption_is_recorded(monkeypatch, tmp_path):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(inputs, "random", interrupted)
    with pytest.raises(KeyboardInterrupt):
        backward.main(["--quick", "--rows", "1", "8", "--rounds", "1", "--record", "name"])
    assert [row["number"] for row in json.loads((tmp_path / "name.json").read_text())["rows"]] == [1]


def measured_row(number, **values):
    error = {"error": 4e-3, "rounding": 1.7e-3, "at_most": 5e-3}
    row = {"number": number, "name": f"row {number}", "data": "real", "N": 1, "V": 2, "D": 3, "wrt": ["e", "c"]}
    row |= {"x": {"median": 1.5, "p10": 1.4, "p90": 1.6}, "x_at_most": 1.5, "call": {"median_ms": 2.0}}
    row |= {"errors": {"e": error, "c": error}, "zero_rows": 0.25, "flagged": 0.5, "mean_loss": 1.0}
    return row | {"extra_bytes": 2**20, "extra_bytes_at_most": 2**20} | values


def test_tables_of_backward_mark_what_is_above_its_limit():
    far = {"error": 6e-3, "rounding": 1.7e-3, "at_most": 5e-3}
    rows = [
        measured_row(1),
        measured_row(2, x_at_most=1.4),
        measured_row(3, errors={"c": far}),
        measured_row(4, extra_bytes=2**21),
        measured_row(5, x_at_most=None, extra_bytes_at_most=None, errors={}),
        {"number": 6, "name": "row 6", "data": "real", "wrong": "off"},
    ]
    data = {"data": "real", "N": 1, "V": 2, "D": 3, "mean_loss": 1.0, "rounding": {"e": 1.7e-3, "c": 1.6e-3}}
    text = shown(backward_tables.row_table({"data": [data], "rows": rows}))
    lines = [next(line for line in text.splitlines() if row["name"] in line) for row in rows]
    for row, line, over in zip(rows, lines, (None, "1.500", "6.00", "2.0", None, None), strict=True):
        told = shown(backward_tables.one_line(row))
        for where in (line, told):
            assert where.count("over") == (over is not None)
            assert over is None or f"over: {over}" in where
    assert "wrong" in lines[5]
    assert "wrong: off" in shown(backward_tables.one_line(rows[5]))
    assert readme_table.backward({"rows": rows}).splitlines()[2] == (
        "| row 1 | real | 1, 2, 3 | 2.00 ms, 1.50 X | 1.5 X | 4.0e-03 | 4.0e-03 | 1.0 MiB |"
    )


def test_kernels_are_summed_by_name_and_shown():
    mangled = "_ZN9cce_numba6hopper13make_a_kernel12_3clocals_3e8a_kernelB2v1B4cw51E10float32_2ai"
    name = "cce_numba.hopper.make_a_kernel.a_kernel"
    kernels = kernel_times.summed((kernel_times.readable(x), us) for x, us in [("copy", 1.0), (mangled, 2.0), (mangled, 3.0)])
    assert kernels == [{"name": name, "calls": 2, "us": 5.0}, {"name": "copy", "calls": 1, "us": 1.0}]
    text = shown(backward_tables.kernel_table(measured_row(1, kernels=kernels)))
    assert name in text
    assert "83.3%" in text
    assert "not there" in shown(backward_tables.kernel_table(measured_row(1, kernels="not there")))


def test_the_table_of_the_backward_is_what_was_measured():
    if not (path := readme_table.recorded("backward")).exists():
        pytest.skip(f"{path.name} has not been measured yet")
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert readme_table.backward(json.loads(path.read_text())) in readme, "benchmarks/readme_table.py backward prints it"


@pytest.fixture(scope="module")
def training():
    """`training`, which imports PyTorch."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(forward.__file__).parent))
        return importlib.import_module("training")


@pytest.fixture
def training_without_gpu(training, without_gpu, monkeypatch):
    """`training` on the CPU, where all memory is 1 MiB, a graph is the step itself, and code is traced but not generated."""
    import torch

    @contextlib.contextmanager
    def peak_memory():
        yield SimpleNamespace(bytes=2**20)

    def compiled(function):
        return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are so small that threads only wait for each other
    torch._dynamo.reset()
    monkeypatch.setattr(training, "DEVICE", "cpu")
    monkeypatch.setattr(training, "cupy", NumpyAsCupy())
    monkeypatch.setattr(training, "peak_memory", peak_memory)
    monkeypatch.setattr(training, "compiled", compiled)
    monkeypatch.setattr(training, "captured", lambda step: (step, 2**20))
    monkeypatch.setattr(cublas, "torch_with_cuda", lambda: torch)
    monkeypatch.setattr(training, "LEARNING_STEPS", 5)
    monkeypatch.setattr(training, "STEPS", 4)
    monkeypatch.setattr(training, "QUICK_SHAPES", ((128, 1000, 200),))
    monkeypatch.setattr(training, "QUICK_SIZE", training.Size(2, 32, 1000, hidden=64, layers=1, heads=2))
    yield training
    torch._dynamo.reset()
    torch.set_num_threads(threads)


def test_parts_of_training_are_chosen(training, capsys):
    chosen = training.parse([])
    assert (chosen.parts, chosen.shapes, chosen.size) == (("autograd", "step"), training.SHAPES, training.SIZE)
    chosen = training.parse(["--only", "step", "--quick"])
    assert (chosen.parts, chosen.shapes, chosen.size) == (("step",), training.QUICK_SHAPES, training.QUICK_SIZE)
    for arguments, message in ((["--only", "loss"], "invalid choice"), (["--burst", "0"], "at least 1")):
        with pytest.raises(SystemExit):
            training.parse(arguments)
        assert message in capsys.readouterr().err


def test_training_refuses_without_a_gpu(training, monkeypatch):
    monkeypatch.setattr(training.machine, "why_no_gpu", lambda: None)
    monkeypatch.setattr(cublas, "torch_with_cuda", lambda: None)
    with pytest.raises(SystemExit, match="training: this PyTorch finds no GPU"):
        training.main([])
    monkeypatch.setattr(training.machine, "why_no_gpu", lambda: "there is none")
    with pytest.raises(SystemExit, match="training: there is none"):
        training.main([])


def test_what_autograd_may_add(training):
    def allowed(direct):
        found = training.compared({training.DIRECT: [direct] * 3, training.OURS: [direct + 0.05] * 3})
        assert found["more_ms"]["median"] == 0.05
        return found["more_ms_at_most"]

    assert (allowed(1.0), allowed(20.0)) == (0.1, 0.6)


def test_training_validates_times_shows_and_records(training_without_gpu, tmp_path, capsys):
    training = training_without_gpu
    training.main(["--quick", "--rounds", "2", "--record", "name"])
    out = capsys.readouterr().out
    for part in ("128 x 1000 x 200, cpu", "head untied", "extra MiB", "CUDA graph"):
        assert part in out
    assert "wrong" not in out
    written = json.loads((tmp_path / "name.json").read_text())
    (call,) = written["calls"]
    assert list(call["losses"]) == [training.OURS, training.STORED, training.COMPILED_LOSS]
    assert call["losses"][training.OURS]["errors"] == {"loss": 0, "e": 0, "c": 0}
    assert call["losses"][training.OURS]["extra_bytes"] == 2**20 - 2 * 200 * (128 + 1000)
    assert call["device"][training.DIRECT]["runs"] == 2
    step = written["step"]
    assert step["last_loss"] < step["first_loss"]
    assert [row["loss"] for row in step["rows"]] == [*call["losses"], *[training.OURS, training.STORED] * 2]
    for row in step["rows"]:
        assert 0 <= row["apart"] <= step["apart_at_most"]
        assert row["tokens_per_s"] == pytest.approx(64e3 / row["median_ms"], rel=0.01)
        assert row["runs"] == 2


def test_steps_are_timed_where_nothing_changes(training_without_gpu, monkeypatch, capsys):
    training, seen = training_without_gpu, []

    class Trainer(training.Trainer):
        def step(self, loss):
            value = super().step(loss)
            seen.append(self.model.head.detach().float().numpy())
            return value

    monkeypatch.setattr(training, "Trainer", Trainer)
    training.main(["--quick", "--only", "step", "--tied", "--rounds", "2"])
    assert "head tied" in capsys.readouterr().out
    learning, timed = seen[: training.LEARNING_STEPS], seen[-2 * 7 :]
    assert not np.array_equal(learning[-1], learning[-2])
    assert all(np.array_equal(one, learning[-1]) for one in timed)


@pytest.mark.parametrize("factor", [0.5, float("nan")])
def test_a_wrong_loss_in_training_is_told_and_not_timed(training_without_gpu, factor, monkeypatch, tmp_path, capsys):
    training, right = training_without_gpu, training_without_gpu.cct.linear_cross_entropy

    def wrong(e, c, targets):  # the loss is right, or NaN, its gradients are not
        loss = right(e * factor, c, targets)
        return loss + (right(e, c, targets) - loss).detach()

    monkeypatch.setattr(training.cct, "linear_cross_entropy", wrong)
    with pytest.raises(
        SystemExit, match=r"not timed: 128 x 1000 x 200; eager, cce_numba; compiled, cce_numba; CUDA graph, cce_"
    ):
        training.main(["--quick", "--rounds", "1", "--record", "name"])
    out = capsys.readouterr().out
    assert "wrong: cce_numba: " in out
    assert "from those of stored logits" in out
    written = json.loads((tmp_path / "name.json").read_text())
    assert "device" not in written["calls"][0]
    for row in written["step"]["rows"]:
        assert ("median_ms" in row) == (row["loss"] != training.OURS)


def test_a_way_that_fails_leaves_the_others(training_without_gpu, monkeypatch, capsys):
    def captured(step):
        raise RuntimeError("no graphs [here]")

    monkeypatch.setattr(training_without_gpu, "captured", captured)
    with pytest.raises(SystemExit, match=r"not timed: CUDA graph, cce_numba; CUDA graph, stored logits$"):
        training_without_gpu.main(["--quick", "--only", "step", "--rounds", "1"])
    assert "wrong: RuntimeError: no graphs [here]" in capsys.readouterr().out


def test_tables_of_training(training):
    tables = importlib.import_module("training_tables")
    times = {name: {"median_ms": 1.0, "min_ms": 0.9, "max_ms": 1.2} for name in (training.DIRECT, training.OURS)}
    slow = times | {"more_ms": {"median": 0.2, "p10": 0.1, "p90": 0.3}, "more_ms_at_most": 0.1}
    good = times | {"more_ms": {"median": 0.05, "p10": 0.1, "p90": 0.3}, "more_ms_at_most": 0.1}
    losses = {training.OURS: {"errors": {"loss": 0, "e": 1e-3, "c": 2e-3}, "extra_bytes": 2**21}}
    losses[training.STORED] = {"does_not_fit": True}
    call = {"N": 1, "V": 2, "D": 3, "backend": "hopper", "losses": losses, "device": good, "host": slow}
    bad = {"N": 4, "V": 5, "D": 6, "backend": "hopper", "losses": {}, "wrong": "off"}
    results = {"calls": [call, bad], "step": None}
    text = "".join(map(shown, tables.tables(results)))
    assert text.count("over: 0.200") == 1
    assert "does not fit" in text
    assert "4 x 5 x 6, hopper wrong" in text
    assert "wrong: off" in shown(tables.call_line(bad))
    assert [name for name, found in tables.named(results) if "wrong" in found] == ["4 x 5 x 6"]
