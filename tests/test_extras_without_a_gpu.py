"""What calls with extras launch on a GPU: the host's part of each backend, on a GPU that is not there."""

from __future__ import annotations

import numpy as np
import pytest

import cce_numba as cce
from cce_numba.interchange import BFLOAT16
from cce_numba.launch.absent import absent_gpu
from tests.helpers import offline
from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has some of these kernels, and needs no such GPU", allow_module_level=True)

N, V, D, K = 300, 1000, 64, 3
GPUS = {"hopper": (9, 0), "ampere": (8, 0), "simt": (7, 5)}
EXTRAS = {"entropy": True, "sum_squares": True, "top_k": 5, "batch_invariant": True}


@pytest.fixture(params=GPUS)
def backend(request):
    return request.param


@pytest.fixture
def absent(backend):
    with absent_gpu(GPUS[backend]) as (cupy, launched):
        yield cupy, launched


@pytest.fixture
def _zeroed(absent, monkeypatch):
    """Host code reads, by array operations, what kernels would have written."""
    cupy, _ = absent
    make_memory_of_zeros(cupy, monkeypatch)


def make_memory_of_zeros(cupy, monkeypatch):
    empty = cupy.empty

    def zeroed(shape, dtype=float):
        array = empty(shape, dtype)
        array._host[...] = 0
        return array

    monkeypatch.setattr(cupy, "empty", zeroed)


def names(launched):
    return {kernel.function.__name__.removesuffix("_kernel") for kernel in launched}


@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float16)], ids=str)
@pytest.mark.parametrize("several", [False, True], ids=["one target", "several targets"])
def test_everything_together(absent, backend, dtype, several):
    """All extras, a bias, a softcap and a filter, forward and backward, with what flows into all that has a gradient."""
    cupy, launched = absent
    e, c, bias = cupy.zeros((N, D), dtype), cupy.zeros((V, D), dtype), cupy.zeros(V, np.float32)
    targets = cupy.zeros((N, K) if several else N, np.int64)
    options = {"bias": bias, "softcap": 20.0, "reduction": "none", "backend": backend} | EXTRAS
    if several:
        options["target_probs"] = cupy.zeros((N, K), np.float32)
    result = cce.forward(e, c, targets, **options)
    assert (result.top_ids.shape, result.top_ids.dtype) == ((N, 5), np.int64)
    assert (result.top_logprobs.shape, result.top_logprobs.dtype) == ((N, 5), np.float32)
    assert result.entropy.shape == result.sum_squares.shape == result.lse.shape == (N,)
    ones, forward = cupy.zeros(N, np.float32), names(launched)
    if backend != "simt":
        assert "best" in forward
        assert ("indexed_dots" in forward) == several
    assert result._statistics.target_logit.shape == ((N, K) if several else (N,))
    del launched[:]
    grads = cce.backward(result, d_loss=ones, d_lse=ones, d_entropy=ones, d_logprobs=cupy.zeros(targets.shape, np.float32))
    assert grads.e.shape == (N, D)
    assert grads.bias.shape == (V,)
    backward = names(launched)
    if backend != "simt":
        assert ({"invert", "place", "take_from_bias"} <= backward) == several
        surveys = [kernel for kernel in launched if kernel.function.__name__ == "rounds_kernel"]
        assert len(surveys) == 2, "an exact dE, and gradients that are filtered"
        if backend == "hopper":
            assert len({kernel.identity for kernel in surveys}) == 2, "an exact dE has rounds of its own"


def test_log_probabilities(absent, backend):
    cupy, launched = absent
    found = cce.linear_logprobs(
        cupy.zeros((2, N, D), BFLOAT16),
        cupy.zeros((V, D), BFLOAT16),
        cupy.zeros((2, N, K), np.int64),
        backend=backend,
        **EXTRAS,
    )
    assert found.logprobs.shape == (2, N, K)
    assert found.top_ids.shape == (2, N, 5)
    assert found.entropy.shape == (2, N)
    assert "draw_seed" not in names(launched)


def test_plans_know_of_it(absent, backend):
    cupy, _ = absent
    e, c = cupy.zeros((N, D), np.float16), cupy.zeros((V, D), np.float16)
    one, several = cupy.zeros(N, np.int64), cupy.zeros((N, 60), np.int64)
    plain, best = cce.explain(e, c, one, backend=backend), cce.explain(e, c, one, backend=backend, top_k=50)
    assert best.forward_bytes > plain.forward_bytes
    probs = cupy.zeros((N, 60), np.float32)
    of_several = cce.explain(e, c, several, target_probs=probs, backend=backend)
    if backend != "simt":
        assert of_several.backward_bytes - plain.backward_bytes == 16 * 384 * 60 + 16 * N + 12 * V
        assert of_several.forward_bytes - plain.forward_bytes == 4 * 59 * N + 4 * N - 4 * N
    invariant = cce.explain(e, c, one, backend=backend, batch_invariant=True)
    assert "the gradient of e is exact" in invariant.filter


def test_more_best_entries_than_tensor_cores_find_go_to_portable_kernels(absent, backend):
    cupy, _ = absent
    e, c, targets = cupy.zeros((N, D), BFLOAT16), cupy.zeros((V, D), BFLOAT16), cupy.zeros(N, np.int64)
    assert cce.explain(e, c, targets, top_k=64).backend == backend
    assert cce.explain(e, c, targets, top_k=65).backend == "simt"


@pytest.mark.usefixtures("_zeroed")
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_distillation(absent, kind):
    """By portable kernels where the teacher is none for tensor cores, whatever each head's dtype is."""
    cupy, launched = absent
    student = cupy.zeros((N, D), BFLOAT16), cupy.zeros((V, D), BFLOAT16)
    teacher = cupy.zeros((N, 32), np.float64), cupy.zeros((V, 32), np.float64)
    _, grads = cce.linear_distillation_with_grad(*student, *teacher, kind=kind, temperature=2.0, softcap=9.0)
    assert grads.e.dtype == grads.c.dtype == BFLOAT16
    assert {"log_probabilities", "divergence", "d_e", "d_c"} <= names(launched)
    assert "gradient_of_logits" not in names(launched)


@pytest.mark.usefixtures("_zeroed")
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("wrt", [("e", "c", "bias"), ("e",), ("c",), ("bias",)], ids="".join)
def test_distillation_on_tensor_cores(absent, backend, kind, wrt):
    """On Hopper by the kernels of the forward and the backward, which are made for the teacher; its dtype may be another."""
    cupy, launched = absent
    student = cupy.zeros((N, D), BFLOAT16), cupy.zeros((V, D), BFLOAT16)
    teacher = cupy.zeros((N, 33), np.float16), cupy.zeros((V, 33), np.float16)
    options = {"kind": kind, "temperature": 2.0, "bias": cupy.zeros(V, np.float32), "teacher_softcap": 9.0}
    _, grads = cce.linear_distillation_with_grad(*student, *teacher, wrt=wrt, **options)
    assert {name for name in ("e", "c", "bias") if getattr(grads, name) is not None} == set(wrt)
    kernels = [kernel for kernel in launched if kernel.function.__name__ in ("forward_kernel", "backward_kernel")]
    if backend != "hopper":
        assert "log_probabilities" in names(launched)
    else:
        assert [kernel.function.__name__ for kernel in kernels] == ["forward_kernel"] * 3 + ["backward_kernel"]
        assert ["TeacherForm" in kernel.identity for kernel in kernels] == [False, False, True, True]
        assert all(kind in kernel.identity for kernel in kernels[2:])


def test_distillation_that_asks_for_a_backend(absent, backend):
    cupy, _ = absent
    arrays = [cupy.zeros(shape, BFLOAT16) for shape in ((N, D), (V, D), (N, 32), (V, 32))]
    if backend == "ampere":
        with pytest.raises(
            NotImplementedError, match="distillation: backend 'ampere' does not have it yet; those that have are"
        ):
            cce.linear_distillation(*arrays, backend=backend)
    if backend == "hopper":
        wide = [cupy.zeros(shape, np.float32) for shape in ((N, 32), (V, 32))]
        with pytest.raises(cce.BackendUnavailable, match="teacher_e: backend: 'hopper' cannot run this: its tensor cores take"):
            cce.linear_distillation(*arrays[:2], *wide, backend=backend)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("options", [{"filter_eps": None}, {"filter": "unbiased"}], ids=str)
def test_kernels_of_distillation_compile(options, monkeypatch):
    with absent_gpu((8, 0)) as (cupy, launched):
        make_memory_of_zeros(cupy, monkeypatch)
        student = cupy.zeros((N, D), np.float32), cupy.zeros((V, D), np.float32)
        teacher = cupy.zeros((N, 32), BFLOAT16), cupy.zeros((V, 32), BFLOAT16)
        cce.linear_distillation_with_grad(*student, *teacher, kind="jsd", **options)
        names = "log_probabilities_kernel", "divergence_kernel", "flag_kernel"
        kernels = {x for x in launched if x.function.__name__ in names}
    # The teacher's, the student's in both directions, and the sum. A filter has lists of its own, and the kernel of its bits.
    assert len(kernels) == (4 if options == {"filter_eps": None} else 6)
    for kernel in kernels:
        compiled = offline.compile_launched(kernel, (8, 0))
        # Of a tile's last loop, which reads the teacher's numbers; the products themselves spill nothing.
        assert compiled.spilled_bytes <= 320, kernel.function.__name__
        assert compiled.count(r"call(\.uni)?") == 0
        assert not compiled.count(r"(shfl|vote|redux|atom|red)\.\S+"), "no warp-level operation, no atomics"


@pytest.mark.parametrize(
    "options", [{"filter_eps": None}, {"filter_c_grad": False}, {"filter_e_grad": False, "filter": "drop"}]
)
@pytest.mark.parametrize("several", [False, True], ids=["one target", "several targets"])
def test_kept_logits(absent, backend, several, options):
    """All kernels can be made that take part where logits are kept, and the backward's reads what the forward kept."""
    cupy, launched = absent
    e, c, bias = cupy.zeros((N, D), BFLOAT16), cupy.zeros((V, D), BFLOAT16), cupy.zeros(V, np.float32)
    targets = cupy.zeros((N, K) if several else N, np.int64)
    options = {"bias": bias, "softcap": 20.0, "entropy": True, "top_k": 3, "workspace_bytes": 10**6} | options
    if several:
        options["target_probs"] = cupy.zeros((N, K), np.float32)
    result = cce.forward(e, c, targets, backend=backend, **options)
    kept = result._statistics.kept_logits
    assert (0 if kept is None else kept.nbytes) == (3 * 6 * 49_664 if backend == "hopper" else 0) == result.plan.kept_bytes
    grads = cce.backward(result)
    assert grads.c.shape == (V, D)
    if backend == "hopper":
        makers = [kernel.identity for kernel in launched if kernel.function.__name__ == "backward_kernel"]
        plain = cce.backward(cce.forward(e, c, targets, backend=backend, **options | {"workspace_bytes": 0}))
        assert plain.c.shape == (V, D)
        others = [kernel.identity for kernel in launched if kernel.function.__name__ == "backward_kernel"][len(makers) :]
        assert set(makers) != set(others)


@pytest.mark.parametrize("several", [False, True], ids=["one target", "several targets"])
@pytest.mark.parametrize("allow_tf32", [False, True])
def test_float32_on_tensor_cores(several, allow_tf32):
    """On request, with all extras."""
    with absent_gpu((8, 0)) as (cupy, launched):
        e, c, bias = cupy.zeros((N, D), np.float32), cupy.zeros((V, D), np.float32), cupy.zeros(V, np.float32)
        targets = cupy.zeros((N, K) if several else N, np.int64)
        options = {"bias": bias, "softcap": 20.0, "backend": "ampere", "allow_tf32": allow_tf32} | EXTRAS
        if several:
            options["target_probs"] = cupy.zeros((N, K), np.float32)
        result = cce.forward(e, c, targets, **options)
        grads = cce.backward(result)
        assert grads.e.dtype == grads.c.dtype == np.float32
        assert {"best", "backward"} <= names(launched)


@pytest.mark.parametrize("several", [False, True], ids=["one target", "several targets"])
@pytest.mark.parametrize("options", [{}, {"filter": "drop"}, {"filter_eps": None, "workspace_bytes": 10**6}], ids=str)
def test_shards_of_a_vocabulary(absent, backend, several, options, monkeypatch):
    """The host's part of ranks that have some rows each, or none."""
    cupy, launched = absent
    empty = cupy.empty

    def zeroed(shape, dtype=float):  # ranks read what kernels would have written
        array = empty(shape, dtype)
        array._host[...] = 0
        return array

    monkeypatch.setattr(cupy, "empty", zeroed)
    e, targets = cupy.zeros((N, D), BFLOAT16), cupy.zeros((N, K) if several else N, np.int64)
    options = {"softcap": 20.0, "entropy": True, "backend": backend} | options
    if several:
        options["target_probs"] = cupy.zeros((N, K), np.float32)
    cuts = ((0, 400), (400, 400), (400, V))
    parts = [
        cce.forward_shard(e, cupy.zeros((stop - start, D), BFLOAT16), targets, vocab_start=start, vocab_size=V, **options)
        for start, stop in cuts
    ]
    for part, (start, stop) in zip(parts, cuts, strict=True):
        result = cce.merge(part, [other.packed for other in parts])
        grads = cce.backward(result)
        assert grads.e.shape == (N, D)
        assert grads.c.shape == (stop - start, D)
    assert "indexed_dots" in names(launched) or not several or backend == "simt" or options.get("filter_eps", 1) is None
