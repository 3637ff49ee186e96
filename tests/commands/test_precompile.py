"""`python -m cce_numba precompile`: it makes what launches will ask for, tells what it made, refuses what it cannot make."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cce_numba as cce
from cce_numba.__main__ import main
from cce_numba.commands.options import OPTIONS
from cce_numba.options import FILTERS
from tests.helpers.cases import DTYPES, Edges, cases, filters, with_terms
from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator compiles nothing", allow_module_level=True)

from cce_numba.commands import precompile
from cce_numba.launch import cubin_cache
from cce_numba.launch.absent import absent_gpu
from cce_numba.launch.kernel import Kernel

ROOT = Path(__file__).parents[2]
EDGES = Edges(n=(1, 128, 256), v=(1, 8, 128, 192), d=(1, 8, 64, 128, 256), max_n=700, max_v=3000, max_d=400)

pytestmark = pytest.mark.usefixtures("compiler")


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """A cache of its own. Sources stay what they are, even if somebody edits them meanwhile."""
    monkeypatch.setenv("CCE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cubin_cache, "_sources", lambda: "sources")
    return tmp_path / "cache"


class Built(list):
    in_truth: ClassVar[set[str]] = set()


@pytest.fixture
def compiles_at_once(monkeypatch):
    """Kernels that "were compiled", by name; those in `in_truth` are."""
    built, really_build = Built(), Kernel.build

    def build(kernel):
        built.append(kernel.function.__name__)
        if kernel.function.__name__ in built.in_truth:
            return really_build(kernel)
        return SimpleNamespace(
            entry_name="symbol", library=SimpleNamespace(get_cubin=lambda: SimpleNamespace(code=bytes(5000)))
        )

    monkeypatch.setattr(Kernel, "build", build)
    return built


def names_of(case) -> set[str]:
    """What `--options` would be told for a call with these options."""
    o = case.options
    names = {
        "bias": "bias" in o and o["bias"].dtype == case.e.dtype,
        "bias-fp32": "bias" in o and o["bias"].dtype != case.e.dtype,
        "softcap": o.get("softcap") is not None,
        "logit-scale": o.get("logit_scale") is not None,
        "label-smoothing": bool(o.get("label_smoothing")),
        "z-loss": bool(o.get("z_loss")),
        "class-weights": o.get("class_weights") is not None,
        "token-weights": o.get("token_weights") is not None,
        "accum-e-fp32": o.get("accum_e_fp32"),
        "accum-c-fp32": o.get("accum_c_fp32"),
        "several-targets": o.get("target_probs") is not None,
        "entropy": o.get("entropy"),
        "sum-squares": o.get("sum_squares"),
        "top-k": o.get("top_k"),
        "batch-invariant": o.get("batch_invariant"),
        "drop": o.get("filter") == "drop",
        "exact": o.get("filter_eps", "auto") is None,
    }
    assert set(names) == set(OPTIONS)
    return {name for name, has in names.items() if has}


@pytest.mark.parametrize("backend", ["simt", "ampere", "hopper"])
@pytest.mark.parametrize("several", [False, True], ids=["one target", "several targets"])
def test_a_call_with_extras_launches_nothing_else(backend, several):
    extras = {"entropy": True, "sum_squares": True, "top_k": 3, "batch_invariant": True}
    names = ["entropy", "sum-squares", "top-k", "batch-invariant", *["several-targets"] * several]
    _, kernels = precompile.kernels_of(backend, "float16", names, (9, 0))
    with absent_gpu((9, 0)) as (cupy, launched):
        N, V, D, K = 77, 500, 256, 5
        arrays = cupy.zeros((N, D), np.float16), cupy.zeros((V, D), np.float16), cupy.zeros((N, K) if several else N, np.int64)
        if several:
            extras["target_probs"] = cupy.zeros((N, K), np.float32)
        result = cce.forward(*arrays, **extras, backend=backend)
        cce.backward(result, d_entropy=1.0, d_logprobs=2.0)
        cce.backward(result, d_lse=1.0, wrt="c")
    unforeseen = {f"{kernel.identity}{kernel.signature}" for kernel in set(launched) - set(kernels)}
    assert not unforeseen


@settings(max_examples=60)
@pytest.mark.parametrize("backend", ["simt", "ampere", "hopper"])
@given(data=st.data())
def test_a_call_of_any_size_launches_nothing_else(backend, data):
    """Whatever the sizes, the reduction, the shift, which gradients are wanted and where they go."""
    dtypes = {"simt": DTYPES, "ampere": DTYPES[:3], "hopper": DTYPES[:2]}[backend]
    case = data.draw(cases(EDGES, dtypes, smallest_n=1))
    case = data.draw(with_terms(case.with_options(**data.draw(filters()))))
    case = case.with_options(filter=data.draw(st.sampled_from(FILTERS), label="filter"))
    wrt = data.draw(st.sampled_from([None, "e", "c", ("e", "c")]), label="wrt")
    _, kernels = precompile.kernels_of(backend, case.e.dtype.name, names_of(case), (9, 0))
    with absent_gpu((9, 0)) as (cupy, launched):
        arrays = [cupy.asarray(x) for x in (case.e, case.c, case.targets)]
        options = {name: cupy.asarray(x) if isinstance(x, np.ndarray) else x for name, x in case.options.items()}
        _, grads = cce.linear_cross_entropy_with_grad(*arrays, **options, wrt=wrt, backend=backend)
        cce.linear_cross_entropy_with_grad(*arrays, **options, wrt=wrt, out=grads, accumulate=True, backend=backend)
        cce.linear_cross_entropy(*arrays, **options, backend=backend)
        cce.backward(cce.forward(*arrays, **options, backend=backend), d_lse=1.0)
    unforeseen = {f"{kernel.identity}{kernel.signature}" for kernel in set(launched) - set(kernels)}
    assert not unforeseen


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_is_what_its_name_says(name):
    """It reaches the call: a misspelt one would be refused there."""
    for dtype in ("float32", "bfloat16"):
        assert precompile.kernels_of(None, dtype, [name], (9, 0))[1]


def test_launches_find_what_was_compiled(directory, compiles_at_once, capsys):
    """The files are those that launches of other sizes look for, of the device's own compute capability."""
    compiles_at_once.in_truth = {"list_tokens_kernel", "finish_kernel"}
    assert main(["precompile", "--backend", "simt", "--dtype", "float32", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    files = set(directory.iterdir())
    (group,) = json.loads(out)["kernels"]
    assert group == {
        "backend": "simt",
        "dtype": "float32",
        "compute_capability": "9.0",
        "compiled": len(files),
        "there_before": 0,
        "bytes": sum(path.stat().st_size for path in files),
    }
    with absent_gpu((9, 0)) as (cupy, launched):
        arrays = cupy.zeros((77, 200), np.float32), cupy.zeros((5000, 200), np.float32), cupy.zeros(77, np.int64)
        cce.backward(cce.forward(*arrays))
    asked = {kernel.path((9, 0)) for kernel in launched}
    assert asked <= files
    assert len(asked) == 9
    for path in asked:
        symbol, code = cubin_cache.read(path)
        if path.name.startswith(tuple(compiles_at_once.in_truth)):
            assert code[:4] == b"\x7fELF"
            assert symbol.encode() in code
            assert 90 in code[48:52], "sm_90, in the ELF header's flags"
    assert not {kernel.path((8, 0)) for kernel in launched} & files
    assert {entry.package for entry in cubin_cache.entries()} == {"simt"}


def test_it_compiles_what_is_missing_and_says_so(directory, compiles_at_once, capsys):
    """In tables of 100 columns where stdout is no terminal, and without a word on stderr."""
    command = ["precompile", "--dtype", "bfloat16", "float32", "--cc", "9.0", "8.0"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(map(len, out.splitlines())) == 100
    assert str(directory) in re.sub(r"[│\s]", "", out), "however the table breaks it"
    for part in ("hopper, bfloat16, 9.0", "simt, float32, 9.0", "ampere, bfloat16, 8.0", "simt, float32, 8.0"):
        assert part in out
    assert f"{len(compiles_at_once)} kernels" in out
    count = len(compiles_at_once)
    assert len(list(directory.iterdir())) == count > 30

    next(directory.glob("lse_kernel*")).unlink()
    assert main([*command, "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["kernels"]
    assert sum(group["compiled"] for group in groups) == 1
    assert sum(group["there_before"] for group in groups) == count - 1
    assert compiles_at_once[count:] == ["lse_kernel"]


def test_every_dtype_takes_the_backend_that_a_call_would(compiles_at_once, capsys):
    assert main(["precompile", "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["kernels"]
    pairs = {(group["backend"], group["dtype"]) for group in groups}
    assert pairs == {("hopper", "float16"), ("hopper", "bfloat16"), ("simt", "float32"), ("simt", "float64")}
    assert main(["precompile", "--backend", "hopper", "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["kernels"]
    assert {group["dtype"] for group in groups} == {"float16", "bfloat16"}
    assert sum(group["compiled"] for group in groups) == 0


def test_options_change_what_is_compiled(compiles_at_once, capsys):
    assert main(["precompile", "--backend", "simt", "--dtype", "float16"]) == 0
    plain = len(compiles_at_once)
    assert (
        main(["precompile", "--backend", "simt", "--dtype", "float16", "--options", "bias-fp32", "softcap", "accum-c-fp32"])
        == 0
    )
    more = compiles_at_once[plain:]
    assert sorted(more) == sorted(
        ["indexed_dot_kernel", *2 * ["lse_kernel", "gradient_of_logits_kernel"], "d_c_kernel", "d_bias_kernel"]
    )


@pytest.mark.parametrize(
    ("argv", "code", "parts"),
    [
        (["--backend", "cpu"], 2, ["--backend", "hopper", "simt"]),
        (["--dtype", "int8"], 2, ["--dtype"]),
        (["--options", "speed"], 2, ["--options", "speed", "label-smoothing"]),
        (["--cc", "9"], 2, ["--cc", "like 9.0", "9"]),
        (["--cc", "5.0"], 2, ["--cc", "this compiler knows", "9.0", "got 5.0"]),
        (["--backend", "hopper", "--cc", "8.0"], 3, ["'hopper' cannot run this", "needs compute capability 9.x", "has 8.0"]),
        (["--backend", "hopper", "--dtype", "float32"], 3, ["'hopper' cannot run this", "take float16 and bfloat16"]),
    ],
)
def test_wrong_arguments(directory, compiles_at_once, capsys, argv, code, parts):
    assert main(["precompile", *argv]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("cce_numba: error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err
    assert not compiles_at_once
    assert not directory.exists()


def test_without_a_cache_nothing_is_compiled(compiles_at_once, monkeypatch, capsys):
    monkeypatch.setenv("CCE_CACHE_DIR", "")
    assert main(["precompile"]) == 2
    assert "no kernels are kept, since CCE_CACHE_DIR is empty" in capsys.readouterr().err
    assert not compiles_at_once


def test_a_directory_that_cannot_be_written(directory, compiles_at_once, monkeypatch, capsys):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(cubin_cache.os, "replace", fail)
    assert main(["precompile", "--dtype", "float32"]) == 2
    assert f"{directory} cannot be written: disk full" in capsys.readouterr().err


def test_the_simulator_compiles_nothing():
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}
    command = [sys.executable, "-m", "cce_numba", "precompile"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert "which compiles nothing" in done.stderr


STARTS = """
import sys, time
import numpy as np, ml_dtypes, cupy
import cce_numba as cce
from cce_numba.launch.kernel import Kernel
backend, dtype = sys.argv[1], ml_dtypes.bfloat16 if sys.argv[2] == "bfloat16" else np.dtype(sys.argv[2])
def build(kernel):
    raise AssertionError(f"compiled {kernel.function.__name__} {kernel.signature}")
Kernel.build = build
rng = np.random.default_rng(0)
e, c = (rng.standard_normal((n, 96)).astype(dtype) for n in (200, 3000))
targets = rng.integers(0, 3000, 200)
arrays = [cupy.asarray(x) for x in (e, c, targets)]
cupy.cuda.Device().synchronize()
start = time.perf_counter()
loss, grads = cce.linear_cross_entropy_with_grad(*arrays, backend=backend)
cupy.cuda.Device().synchronize()
seconds = time.perf_counter() - start
exact = cce.linear_cross_entropy(e, c, targets, backend="cpu")
assert abs(float(loss) - exact) <= 1e-4 * (1 + exact), (loss, exact)
print(seconds)
"""


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("backend", "dtype"), [("simt", "float32"), ("simt", "bfloat16"), ("hopper", "bfloat16")])
def test_a_process_on_a_gpu_compiles_nothing_after_that(backend, dtype, directory, monkeypatch):
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(0)
    if backend == "hopper" and properties["major"] != 9:
        pytest.skip("hopper needs compute capability 9.x")
    monkeypatch.undo()  # the digest of sources is the true one here, as other processes have it
    environment = os.environ | {"CCE_CACHE_DIR": str(directory), "NUMBA_ENABLE_CUDASIM": "0"}
    cc = f"{properties['major']}.{properties['minor']}"
    for command in (
        ["-m", "cce_numba", "precompile", "--backend", backend, "--dtype", dtype, "--cc", cc],
        ["-c", STARTS, backend, dtype],
    ):
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 60, "what it takes is for benchmarks to say; but it is not what compiling takes"
