"""`python -m cce_numba`: what it prints, its exit codes, the files it reads, and that a wrong result does not pass.

In this process wherever the machine does not matter; in one of its own, with the environment that is meant, where it does.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

import cce_numba as cce
import reference
from cce_numba.__main__ import main
from cce_numba.backend import BACKENDS
from cce_numba.commands import DTYPES, machine
from cce_numba.commands.measure import progress
from cce_numba.commands.problems import synthetic
from cce_numba.options import FILTERS

ROOT = Path(__file__).parents[2]
SMALL = ("--tokens", "40", "--vocab", "300", "--dim", "16")
ON_CPU = ("demo", "--backend", "cpu", *SMALL)
FILTERED = (*ON_CPU, "--filter-eps", "0.004")  # by either filter enough that survivors are recorded
ERROR = "cce_numba: error: "

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process: exit code, stdout, stderr."""

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        out, err = capsys.readouterr()
        return int(code), out, err

    return run


@pytest.fixture
def run_json(run: Run) -> Callable[..., dict[str, Any]]:
    """Runs a demo that must be fine, and reads its JSON."""

    def run_json(*argv: object) -> dict[str, Any]:
        code, out, err = run(*argv, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return run_json


def run_process(*argv: str, **environment: str) -> tuple[int, str, str]:
    """Runs `python -m cce_numba` in a process of its own: exit code, stdout, stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "cce_numba", *argv],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "NUMBA_ENABLE_CUDASIM": "0"}


def assert_one_error(err: str, *parts: str) -> None:
    """One line that says it is an error, and has all the parts."""
    assert err.startswith(ERROR)
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


def write(path: Path, **changes: Any) -> Path:
    """A demo file in float32, with some of its arrays changed, or left out where None."""
    problem = synthetic(50, 200, 12)
    arrays = {"e": problem.e, "c": problem.c, "targets": problem.targets} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


# ---------------------------------------------------------------- demo: what it shows


@pytest.mark.parametrize("name", FILTERS)
def test_demo_prints_the_same_tables_anywhere(run: Run, name: str) -> None:
    """Where stdout is no terminal: nothing but text, 100 columns, and differences between runs in time and memory only."""
    first, second = run(*FILTERED, "--filter", name), run(*FILTERED, "--filter", name)
    for code, out, err in (first, second):
        assert (code, err) == (0, "")
        assert max(map(len, out.splitlines())) == 100
        for part in (
            "40 tokens, 300 vocabulary entries, 16 dimensions, float32",
            "mean loss",
            "|dC| = ",
            f" {name}, gradients are ",
        ):
            assert part in out
        assert out.count("PASS") == 4
        assert "\x1b" not in out + err
        assert "FAIL" not in out
    same = [
        [line for line in out.splitlines() if not re.search("time|first calls|memory", line)] for _, out, _ in (first, second)
    ]
    assert same[0] == same[1]


def test_demo_json_tells_the_truth(run_json: Callable[..., dict[str, Any]]) -> None:
    """Against the reference, on the problem that the seed makes."""
    found = run_json(*FILTERED, "--seed", 5)
    problem = synthetic(40, 300, 16, seed=5)
    exact = reference.forward(problem.e, problem.c, problem.targets)
    grads = reference.backward(problem.e, problem.c, problem.targets)
    assert found["loss"] == pytest.approx(float(exact.loss), rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(float(exact.loss)), rel=1e-4)
    # The filter takes some away; whether the gradients are right is the demo's own check, tested below.
    assert found["gradient_norms"]["e"] == pytest.approx(np.linalg.norm(grads.e), rel=0.05)
    assert found["gradient_norms"]["c"] == pytest.approx(np.linalg.norm(grads.c), rel=0.05)
    assert found["problem"] | {"source": ""} == {
        "tokens": 40,
        "counting_tokens": 40,
        "vocab": 300,
        "dim": 16,
        "dtype": "float32",
        "source": "",
    }
    assert found["backend"]["name"] == "cpu"
    assert found["known_loss"] is None
    assert (found["filter"]["name"], found["filter"]["eps"]) == ("unbiased", 0.004)
    assert found["filter"]["how"] == cce.explain(problem.e, problem.c, problem.targets, backend="cpu", filter_eps=0.004).filter
    assert found["bytes"]["stored_logits"] == 40 * 300 * 4
    assert found["bytes"]["gradients"] == (40 + 300) * 16 * 4
    assert found["bytes"]["peak"] >= found["bytes"]["gradients"]
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert found["agreement"]["passed"]
    assert (found["agreement"]["tokens"], found["agreement"]["entries"]) == (40, 64)
    assert [check["name"] for check in found["agreement"]["checks"]] == ["loss", "dE", "dC", "filter"]
    for check in found["agreement"]["checks"]:
        assert check["passed"]
        assert 0 <= check["error"] <= check["allowed"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_demo_in_every_dtype(run_json: Callable[..., dict[str, Any]], dtype: str) -> None:
    found = run_json(*ON_CPU, "--dtype", dtype)
    assert found["problem"]["dtype"] == dtype
    assert found["bytes"]["stored_logits"] == 40 * 300 * (8 if dtype == "float64" else 4)


@pytest.mark.parametrize("name", FILTERS)
def test_demo_filter(run_json: Callable[..., dict[str, Any]], name: str) -> None:
    """none keeps everything and has no filter to judge; a coarse one keeps little, and says what it dropped."""
    exact = run_json(*ON_CPU, "--filter", name, "--filter-eps", "none")
    assert exact["filter"]["name"] is exact["filter"]["eps"] is exact["filter"]["survivors"] is None
    assert [check["filtered"] for check in exact["agreement"]["checks"]] == [None] * 3
    coarse = run_json(*ON_CPU, "--filter", name, "--filter-eps", "0.02")
    assert (coarse["filter"]["name"], coarse["filter"]["eps"]) == (name, 0.02)
    assert 0 < coarse["filter"]["survivors"] < 0.9
    assert 0.001 < coarse["filter"]["dropped_mass"] < 0.5
    assert coarse["agreement"]["checks"][1]["filtered"] > coarse["agreement"]["checks"][1]["allowed"]  # yet it passes


def test_demo_tells_why_all_survive(run: Run) -> None:
    """Because nothing is filtered, or because the filter would leave out next to nothing."""
    assert "all, and the gradients are exact  " in run(*ON_CPU, "--filter-eps", "none")[1]
    dense = run(*ON_CPU, "--filter", "drop")[1]
    assert "all, and the gradients are exact: so many may reach a probability of 2.33e-10" in dense


@pytest.mark.parametrize("tokens", [1, 3])
def test_demo_of_less_than_a_sample(run_json: Callable[..., dict[str, Any]], tokens: int) -> None:
    """Fewer tokens and entries than would be compared, and fewer entries than there are bits in a byte of survivors."""
    found = run_json("demo", "--backend", "cpu", "--tokens", tokens, "--vocab", "5", "--dim", "1")
    assert (found["agreement"]["tokens"], found["agreement"]["entries"]) == (tokens, 5)


def test_synthetic_problem_resembles_text() -> None:
    """Its targets are about as likely, and its softmax about as sparse, as a small model's on real text."""
    problem, again = synthetic(512, 8192, 64, seed=3), synthetic(512, 8192, 64, seed=3)
    assert np.array_equal(problem.e, again.e)
    assert not np.array_equal(problem.c, synthetic(512, 8192, 64, seed=4).c)
    exact = reference.forward(problem.e, problem.c, problem.targets)
    assert 2 < exact.loss < 5
    likely = (exact.logits.argmax(axis=1) == problem.targets).mean()
    assert 0.25 < likely < 0.75
    assert 50 < (reference.softmax(exact.logits) >= 2.0**-12).sum(axis=1).mean() < 500


def test_progress_counts_blocks_on_a_terminal() -> None:
    terminal, pipe = io.StringIO(), io.StringIO()
    problem = synthetic(8, 64, 8)
    for file, is_terminal in ((terminal, True), (pipe, False)):
        with progress(Console(file=file, force_terminal=is_terminal), "loss"):
            cce.linear_cross_entropy(problem.e, problem.c, problem.targets, backend="cpu")
    assert "loss: forward" in terminal.getvalue()
    assert pipe.getvalue() == ""


# ---------------------------------------------------------------- demo: files


def as_stored(array: np.ndarray, storage: str) -> np.ndarray:
    """The array as a file may hold it."""
    bfloat16 = array.astype(ml_dtypes.bfloat16)
    stored = {"bfloat16": bfloat16, "bits": bfloat16.view(np.uint16), "raw": bfloat16.view("V2")}
    return stored[storage] if storage in stored else array.astype(storage)


@pytest.mark.parametrize("storage", ["float16", "float32", "float64", "bfloat16", "bits", "raw"])
def test_demo_reads_every_form_of_file(tmp_path: Path, run_json: Callable[..., dict[str, Any]], storage: str) -> None:
    """Loss of the numbers as they were rounded; ignored tokens and the file's own loss included."""
    problem = synthetic(50, 200, 12)
    e, c = as_stored(problem.e, storage), as_stored(problem.c, storage)
    targets = np.where(np.arange(50) % 10 == 3, -100, problem.targets).astype(np.int32)
    known = np.linspace(1, 2, 50, dtype=np.float32)
    path = write(tmp_path / "demo.npz", e=e, c=c, targets=targets, loss=known)
    found = run_json("demo", "--backend", "cpu", "--data", path)

    dtype = ml_dtypes.bfloat16 if storage in ("bfloat16", "bits", "raw") else np.dtype(storage)
    exact = reference.forward(problem.e.astype(dtype), problem.c.astype(dtype), targets)
    assert found["problem"]["dtype"] == np.dtype(dtype).name
    assert (found["problem"]["tokens"], found["problem"]["counting_tokens"]) == (50, 45)
    assert found["problem"]["source"] == f"file {path}"
    assert found["loss"] == pytest.approx(float(exact.loss), rel=1e-5)
    assert found["known_loss"] == pytest.approx(float(known[targets >= 0].mean()), rel=1e-6)


def test_numpy_stores_bfloat16_as_two_raw_bytes(tmp_path: Path) -> None:
    """What the test above relies on: "bfloat16" does come back as a type that NumPy did not know."""
    np.savez(tmp_path / "raw.npz", e=np.ones(2, ml_dtypes.bfloat16))
    assert np.load(tmp_path / "raw.npz")["e"].dtype == np.dtype("V2")


def test_demo_casts_and_cuts_a_file(tmp_path: Path, run_json: Callable[..., dict[str, Any]]) -> None:
    """Also one whose e and c differ in dtype, once --dtype says which."""
    problem = synthetic(50, 200, 12)
    path = write(tmp_path / "demo.npz", c=problem.c.astype(np.float16))
    found = run_json("demo", "--backend", "cpu", "--data", path, "--tokens", 20, "--dtype", "bfloat16")
    assert (found["problem"]["tokens"], found["problem"]["dtype"]) == (20, "bfloat16")
    e, c = problem.e[:20].astype(ml_dtypes.bfloat16), problem.c.astype(np.float16).astype(ml_dtypes.bfloat16)
    assert found["loss"] == pytest.approx(float(reference.forward(e, c, problem.targets[:20]).loss), rel=1e-5)


def test_demo_shows_the_known_loss_and_what_is_ignored(tmp_path: Path, run: Run) -> None:
    """A path in brackets is no markup."""
    targets = np.where(np.arange(50) < 2, -100, synthetic(50, 200, 12).targets)
    path = write(tmp_path / "[bold]demo.npz", targets=targets, loss=np.full(50, 1.25))
    _, out, _ = run("demo", "--backend", "cpu", "--data", path)
    assert "50 tokens (2 ignored)" in out
    assert "the file's" in out
    assert "1.250000 nats, difference" in out
    assert "[bold]demo.npz" in out.replace(" │\n│                 │ ", "")


ONES = np.ones((50, 12), np.float32)
BAD_FILES = {
    "no classifier": ({"c": None}, "lacks c"),
    "no targets": ({"targets": None}, "lacks targets"),
    "e of one dimension": ({"e": ONES[0]}, "shapes (N, D) and (V, D)"),
    "another hidden size": ({"e": np.ones((50, 13), np.float32)}, "shapes (N, D) and (V, D)"),
    "empty classifier": ({"c": np.ones((0, 12), np.float32)}, "shapes (N, D) and (V, D)"),
    "integers": ({"e": ONES.astype(np.int32)}, "e must be one of float16"),
    "raw bytes of another size": ({"e": ONES.view("V4")}, "e must be one of float16"),
    "two dtypes": ({"c": np.ones((200, 12), np.float64)}, "--dtype"),
    "real targets": ({"targets": np.zeros(50)}, "targets must be"),
    "too few targets": ({"targets": np.zeros(49, int)}, "targets must be"),
    "a target past the end": ({"targets": np.full(50, 200)}, "[0, 200)"),
    "a negative target": ({"targets": np.full(50, -1)}, "[0, 200)"),
    "a huge target": ({"targets": np.full(50, 2**64 - 1, np.uint64)}, "[0, 200)"),
    "all ignored": ({"targets": np.full(50, -100)}, "no token that counts"),
    "no tokens": ({"e": ONES[:0], "targets": np.zeros(0, int)}, "no token that counts"),
    "wrong losses": ({"loss": np.zeros(49)}, "loss must be"),
    "pickled objects": ({"targets": np.array([None] * 50)}, "cannot be read as an npz file"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_demo_refuses_a_wrong_file(tmp_path: Path, run: Run, what: str) -> None:
    changes, part = BAD_FILES[what]
    path = write(tmp_path / "demo.npz", **changes)
    code, out, err = run("demo", "--backend", "cpu", "--data", path)
    assert (code, out) == (2, "")
    assert_one_error(err, str(path), part, "a demo file holds e (N, D)")


def test_demo_refuses_what_is_no_npz(tmp_path: Path, run: Run) -> None:
    """Nothing there, a folder, text, a single array, and an archive whose end, or middle, is broken."""
    whole = write(tmp_path / "whole.npz").read_bytes()
    (tmp_path / "text.npz").write_text("not an npz")
    (tmp_path / "empty.npz").write_text("")
    np.save(tmp_path / "single.npy", ONES)
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped.npz").write_bytes(whole[:1000] + bytes(100) + whole[1100:])
    for name in ("absent.npz", "", "text.npz", "empty.npz", "single.npy", "cut.npz", "flipped.npz"):
        code, out, err = run("demo", "--backend", "cpu", "--data", tmp_path / name)
        assert (code, out) == (2, ""), name
        assert_one_error(err, str(tmp_path / name), "a demo file holds e (N, D)")


def test_demo_refuses_more_tokens_than_there_are(tmp_path: Path, run: Run) -> None:
    code, out, err = run("demo", "--backend", "cpu", "--data", write(tmp_path / "demo.npz"), "--tokens", 51)
    assert (code, out) == (2, "")
    assert_one_error(err, "has 50 tokens, --tokens asks for 51")


# ---------------------------------------------------------------- demo: what must not pass


def changed(grads: cce.Gradients, **changes: Any) -> cce.Gradients:
    """Gradients with some replaced by a function of them."""
    return dataclasses.replace(grads, **{name: change(getattr(grads, name)) for name, change in changes.items()})


WRONG_GRADIENTS: dict[str, tuple[Callable[[cce.Result, Callable], cce.Gradients], set[str]]] = {
    "zero": (lambda result, backward: changed(backward(result), e=np.zeros_like, c=np.zeros_like), {"dE", "dC"}),
    "zero dE": (lambda result, backward: changed(backward(result), e=np.zeros_like), {"dE"}),
    "zero dC": (lambda result, backward: changed(backward(result), c=np.zeros_like), {"dC"}),
    "NaN": (lambda result, backward: changed(backward(result), e=lambda e: e * np.float32("nan")), {"dE"}),
    "the other sign": (lambda result, backward: backward(result, d_loss=-1.0), {"dE", "dC"}),
    "two percent too large": (lambda result, backward: backward(result, d_loss=1.02), {"dE", "dC"}),
    "of the sum": (lambda result, backward: backward(result, d_loss=40.0), {"dE", "dC"}),
    "no target term": (
        lambda result, backward: backward(result, d_loss=0.0, d_lse=1 / int(result.n_valid)),
        {"dE", "dC"},
    ),
    "rows in another order": (lambda result, backward: changed(backward(result), e=np.flipud, c=np.flipud), {"dE", "dC"}),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("filter_eps", ["none", "0.004"])
@pytest.mark.parametrize("what", WRONG_GRADIENTS)
def test_demo_fails_for_a_wrong_gradient(
    run: Run, monkeypatch: pytest.MonkeyPatch, what: str, filter_eps: str, dtype: str
) -> None:
    wrong, names = WRONG_GRADIENTS[what]
    backward, argv = cce.backward, (*ON_CPU, "--filter-eps", filter_eps, "--dtype", dtype)
    monkeypatch.setattr(cce, "backward", lambda result: wrong(result, backward))
    code, out, err = run(*argv, "--json")
    assert code == 1
    assert_one_error(err, "does not agree with float64 mathematics")
    found = json.loads(out)["agreement"]
    assert not found["passed"]
    assert {check["name"] for check in found["checks"] if not check["passed"]} == names
    assert run(*argv)[1].count("FAIL") == len(names)


def test_demo_fails_for_a_wrong_loss(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = cce.forward

    def off(*arrays: Any, **options: Any) -> cce.Result:
        result = forward(*arrays, **options)
        statistics = dataclasses.replace(result._statistics, target_logit=result._statistics.target_logit - 1e-3)
        return dataclasses.replace(result, loss=result.loss + 1e-3, _statistics=statistics)

    monkeypatch.setattr(cce, "forward", off)
    code, out, err = run(*ON_CPU)
    assert code == 1
    assert_one_error(err, "mathematics: loss\n")
    assert out.count("FAIL") == 1


@pytest.mark.parametrize(("name", "wrong"), [("drop", ["filter"]), ("unbiased", ["dE", "dC", "filter"])])
@pytest.mark.parametrize("kept", ["nothing", "only targets", "all but targets"])
def test_demo_fails_for_a_filter_that_drops_too_much(
    run: Run, monkeypatch: pytest.MonkeyPatch, kept: str, name: str, wrong: list[str]
) -> None:
    """Of the filter that drops, the gradients of what it keeps are right, so only the rule itself can tell."""
    forward = cce.forward

    def too_few(*arrays: Any, **options: Any) -> cce.Result:
        result = forward(*arrays, **options)
        statistics, targets = result._statistics, arrays[2]
        flags = np.zeros((len(statistics.survivors), len(arrays[1])), bool)
        if kept != "nothing":
            flags[np.arange(len(targets)) // statistics.survivor_block, targets] = True
        survivors = np.packbits(~flags if kept == "all but targets" else flags, axis=1, bitorder="little")
        return dataclasses.replace(result, _statistics=dataclasses.replace(statistics, survivors=survivors))

    monkeypatch.setattr(cce, "forward", too_few)
    code, out, err = run(*FILTERED, "--filter", name)
    assert code == 1
    assert_one_error(err, f"mathematics: {', '.join(wrong)}\n")
    assert out.count("FAIL") == len(wrong)


@pytest.mark.parametrize("times", [1, 2, 20])
def test_demo_allows_for_what_a_coarser_threshold_leaves_out(run: Run, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Of dC, where the plan says so: a backward that leaves out more is found out."""
    forward, coarse_eps = cce.forward, 0.008

    def coarse(*arrays: Any, **options: Any) -> cce.Result:
        result = forward(*arrays, **options)
        return dataclasses.replace(result, plan=dataclasses.replace(result.plan, coarse_eps=coarse_eps))

    def less(result: cce.Result) -> cce.Gradients:
        p, block = result._problem, result._statistics.survivor_block
        softmax = np.exp(p.e.astype(np.float64) @ p.c.astype(np.float64).T - result.lse[:, None])
        keep = reference.column_filter(softmax, p.targets, times * coarse_eps, block)
        exact = reference.backward(p.e, p.c, p.targets, keep_c=keep)
        return dataclasses.replace(cce.Gradients(e=backward(result).e), c=exact.c.astype(np.float32))

    backward = cce.backward
    monkeypatch.setattr(cce, "backward", less)
    code, _, err = run(*FILTERED, "--filter", "drop")
    assert code == 1
    assert_one_error(err, "mathematics: dC\n")
    monkeypatch.setattr(cce, "forward", coarse)
    code, out, err = run(*FILTERED, "--filter", "drop")
    assert code == (times > 1)
    assert out.count("FAIL") == (times > 1)


def test_demo_fails_for_what_is_not_finite(tmp_path: Path, run: Run) -> None:
    """No comparison is passed with a NaN, which is null in JSON."""
    path = write(tmp_path / "demo.npz", e=np.full((50, 12), 1e30, np.float32))
    code, out, err = run("demo", "--backend", "cpu", "--data", path, "--dtype", "float16", "--json")
    assert code == 1
    assert_one_error(err, "mathematics: loss, dE, dC")
    assert json.loads(out)["loss"] is None


# ---------------------------------------------------------------- arguments and exit codes

BAD_ARGUMENTS = {
    "no command": ([], "COMMAND"),
    "another command": (["train"], "train"),
    "another option": (["demo", "--fast"], "--fast"),
    "no tokens": (["demo", "--tokens", "0"], "--tokens"),
    "no number": (["demo", "--vocab", "many"], "--vocab"),
    "too large a number": (["demo", "--dim", "1234567890"], "at most 9 digits"),
    "a negative seed": (["demo", "--seed", "-1"], "--seed"),
    "another dtype": (["demo", "--dtype", "int8"], "--dtype"),
    "another backend": (["demo", "--backend", "tpu"], ", ".join(map(str, BACKENDS))),
    "another filter": (["demo", "--filter", "none"], "--filter"),
    "a filter of everything": (["demo", "--filter-eps", "1"], "auto, none or a number in (0, 1)"),
    "a filter of no number": (["demo", "--filter-eps", "nan"], "auto, none or a number in (0, 1)"),
    "sizes beside a file": (["demo", "--backend", "cpu", "--data", "x.npz", "--vocab", "9"], "--vocab and --dim"),
    "a size beside a file": (["demo", "--backend", "cpu", "--data", "x.npz", "--dim", "9"], "--vocab and --dim"),
}


@pytest.mark.parametrize("what", BAD_ARGUMENTS)
def test_wrong_arguments(run: Run, what: str) -> None:
    argv, part = BAD_ARGUMENTS[what]
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert_one_error(err.replace("'", ""), part)


def test_too_little_memory(run: Run) -> None:
    """4 EB of classifier."""
    code, out, err = run("demo", "--backend", "cpu", "--vocab", "999999999", "--dim", "999999999")
    assert (code, out) == (2, "")
    assert_one_error(err, "too little memory", "choose a smaller one")


@pytest.mark.parametrize("argv", [["info"], list(ON_CPU)])
def test_rich_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err == f"{ERROR}the command line needs rich: pip install 'cce_numba[cli]'\n"


def test_interrupted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arrays: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cce, "forward", interrupt)
    assert run(*ON_CPU) == (130, "", "")


def test_a_backend_that_cannot_run_here() -> None:
    """Known before the problem is made, which would not fit."""
    code, out, err = run_process("demo", "--backend", "simt", "--vocab", "999999999", "--dim", "999999999", **NO_GPU)
    assert (code, out) == (3, "")
    assert_one_error(err, "'simt' cannot run this", "the arrays are on the host")


def test_help_version_and_what_they_import() -> None:
    """Neither needs a GPU library, or is slowed down by one."""
    for argv in (["--help"], ["demo", "--help"], ["precompile", "--help"]):
        code, out, err = run_process(*argv)
        assert (code, err) == (0, "")
        assert "exit codes:" in out
    assert run_process("--version") == (0, f"cce_numba {cce.__version__}\n", "")
    program = "import sys, cce_numba.__main__; print({'numba', 'cupy', 'rich', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# ---------------------------------------------------------------- machines


def test_demo_without_a_gpu_says_why_it_runs_on_the_cpu() -> None:
    code, out, err = run_process("demo", *SMALL, **NO_GPU)
    assert (code, err) == (0, "")
    assert "cpu: " in out
    assert "not simt" in out


def test_demo_in_the_simulator() -> None:
    """The portable kernels themselves, with sizes that they can do there in seconds; the filter on."""
    sizes = ("--tokens", "5", "--vocab", "20", "--dim", "6", "--filter-eps", "0.02")
    code, out, err = run_process("demo", "--backend", "simt", *sizes, "--json", **(NO_GPU | {"NUMBA_ENABLE_CUDASIM": "1"}))
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["backend"]["name"] == "simt"
    assert found["seconds"]["compile"] is None
    assert found["agreement"]["passed"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("gpu")
def test_demo_on_a_gpu(dtype: str) -> None:
    """Chosen without being asked for; memory is what CuPy's pool handed out, so no less than the gradients."""
    sizes = ("--tokens", "300", "--vocab", "5000", "--dim", "96", "--dtype", dtype)
    code, out, err = run_process("demo", *sizes, "--json", NUMBA_ENABLE_CUDASIM="0")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["backend"]["name"] != "cpu"
    assert found["agreement"]["passed"]
    assert found["bytes"]["gradients"] <= found["bytes"]["peak"] < 2**30


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_info_on_a_gpu() -> None:
    code, out, err = run_process("info", "--json", NUMBA_ENABLE_CUDASIM="0")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["devices"][0]["name"]
    assert found["devices"][0]["memory_bytes"] > 2**30
    assert re.fullmatch(r"\d+\.\d+", found["devices"][0]["compute_capability"])
    assert re.fullmatch(r"\d+\.\d+", found["driver_cuda"])
    assert found["no_device"] is None
    assert found["backends"]["CuPy bfloat16"]["runs"] not in (None, "cpu")
    assert "compute capability" in run_process("info", NUMBA_ENABLE_CUDASIM="0")[1]


def test_info_without_a_gpu() -> None:
    code, out, err = run_process("info", "--json", **NO_GPU)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["versions"]["cce_numba"] == cce.__version__
    assert found["versions"]["numpy"] == np.__version__
    assert found["cpu_cores"] >= 1
    assert not found["simulator"]
    assert found["devices"] == []
    assert found["no_device"]
    assert found["backends"]["NumPy float32"]["runs"] == "cpu"
    assert "the arrays are on the host" in found["backends"]["NumPy float32"]["not"]["simt"]
    assert found["backends"]["CuPy bfloat16"]["runs"] is None


def test_info_in_the_simulator() -> None:
    code, out, err = run_process("info", "--json", NUMBA_ENABLE_CUDASIM="1")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["simulator"]
    assert found["backends"]["NumPy float32"]["runs"] == "simt"


def test_info_tells_how_to_get_what_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    version, find_spec = importlib.metadata.version, importlib.util.find_spec

    def version_of(name: str) -> str:
        if name.startswith(("cupy", "torch")):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", version_of)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cupy" else find_spec(name))
    monkeypatch.setattr(machine, "simulated", lambda: False)
    code, out, err = run("info")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) == 100
    assert "not installed; pip install 'cce_numba[cuda13]'" in out
    assert "not installed; pip install 'cce_numba[torch]'" in out
    assert "none: CuPy, which GPU arrays need, is not installed" in out


def test_info_shows_the_cache(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where it is, how large, of which backends, and what in it is of other versions of the package."""
    cubin_cache = pytest.importorskip("cce_numba.launch.cubin_cache")
    monkeypatch.setenv("CCE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cubin_cache, "_sources", lambda: "now")
    found = json.loads(run("info", "--json")[1])["cache"]
    assert found == {
        "directory": str(tmp_path / "cache"),
        "why_unusable": None,
        "bytes": 0,
        "most_bytes": 256 * 2**20,
        "kernels": {},
        "of_other_sources": {"number": 0, "bytes": 0},
    }
    assert "precompile fills it" in run("info")[1]

    for name, kernel, cc in (("a", "simt.forward", (9, 0)), ("b", "simt.tokens", (8, 0)), ("c", "hopper.ring", (9, 0))):
        cubin_cache.store(tmp_path / "cache" / f"{name}.cce-cubin", "symbol", bytes(10**6), f"cce_numba.{kernel}.make()", cc)
    monkeypatch.setattr(cubin_cache, "_sources", lambda: "later")
    cubin_cache.store(tmp_path / "cache" / "d.cce-cubin", "symbol", bytes(10**6), "cce_numba.simt.forward.make()", (9, 0))
    monkeypatch.setattr(cubin_cache, "_sources", lambda: "now")
    found = json.loads(run("info", "--json")[1])["cache"]
    assert {name: (group["number"], group["compute_capabilities"]) for name, group in found["kernels"].items()} == {
        "simt": (2, ["8.0", "9.0"]),
        "hopper": (1, ["9.0"]),
    }
    assert found["of_other_sources"]["number"] == 1
    assert found["bytes"] == sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) > 4 * 10**6
    out = run("info")[1]
    assert max(map(len, out.splitlines())) == 100
    for part in (
        "3.8 MiB of at most 256.0 MiB",
        "2 kernels, 1.9 MiB, compute capability 8.0, 9.0",
        "1 kernels, 1.0 MiB, of other",
    ):
        assert part in out

    monkeypatch.setenv("CCE_CACHE_DIR", "")
    assert json.loads(run("info", "--json")[1])["cache"]["directory"] is None
    assert "no: CCE_CACHE_DIR is empty" in run("info")[1]
