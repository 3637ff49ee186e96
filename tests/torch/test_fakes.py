"""Under compilers nothing runs: what an operator would leave is known from what the backend says of it."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from tests.helpers.harness import SimulatorHarness

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
cct = pytest.importorskip("cce_numba.torch")
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.fx.experimental.symbolic_shapes import ShapeEnv  # noqa: E402

from cce_numba import arguments, gpu, interchange  # noqa: E402
from cce_numba.backend import BACKENDS, backend_module  # noqa: E402
from cce_numba.options import DEFAULTS, Options  # noqa: E402
from cce_numba.torch import fakes, operators  # noqa: E402
from cce_numba.torch.call import MORE, SAVED  # noqa: E402

pytestmark = pytest.mark.skipif(SimulatorHarness.is_active(), reason="about PyTorch alone")
N, V, D = 300, 5000, 64


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """No problem is made, and no backend may be asked for more than what it says."""

    def refused(*args, **named):
        raise AssertionError("something ran")

    for name in BACKENDS:
        for function in ("plan", "indexed_dot", "forward", "reduced_nll", "nll_weight", "backward"):
            monkeypatch.setattr(backend_module(name), function, refused)
    monkeypatch.setattr(arguments, "problem", refused)


def shapes(tensors):
    return [(tuple(x.shape), x.dtype) for x in tensors]


def test_tracing_runs_nothing():
    e, c, targets = torch.randn(N, D), torch.randn(V, D), torch.randint(0, V, (N,))

    def step(e, c, targets):
        e, c = (x.detach().requires_grad_() for x in (e, c))
        return torch.autograd.grad(cct.linear_cross_entropy(e, c, targets, label_smoothing=0.1), (e, c))

    graph = make_fx(step, tracing_mode="fake")(e, c, targets)
    names = [str(node.target) for node in graph.graph.nodes if "cce_numba" in str(node.target)]
    assert [name.split(".")[1] for name in names] == ["linear_cross_entropy", "linear_cross_entropy_backward"]


def test_sizes_that_are_left_open_stay_open():
    """Nothing of what is decided holds for one N or V alone."""
    inputs = torch.randn(N, D), torch.randn(V, D), torch.randint(0, V, (N,))

    def forward(e, c, targets):
        return cct.linear_cross_entropy(e.detach().requires_grad_(), c, targets, reduction="none")

    graph = make_fx(forward, tracing_mode="symbolic")(*inputs)
    (node,) = [node for node in graph.graph.nodes if "cce_numba" in str(node.target)]
    loss, *saved = node.meta["val"]
    of_name = dict(zip((*SAVED, *MORE), saved, strict=True))
    for of_n in (loss.shape[0], of_name["lse"].shape[0], of_name["tokens"].shape[0], *of_name["survivors"].shape):
        assert isinstance(of_n, torch.SymInt)
    environment = node.meta["val"][0].fake_mode.shape_env
    n, v = (node.meta["val"].shape[0].node.expr for node in list(graph.graph.nodes)[:2])
    for bounded in (n, v):
        assert environment.var_to_range[bounded].upper > 2**62
        assert environment.var_to_range[bounded].lower <= 2


@pytest.fixture
def a_device(monkeypatch):
    """An H100, as far as plans look at it."""
    monkeypatch.setattr(gpu, "current", lambda: gpu.Gpu((9, 0), 132))
    monkeypatch.setattr(gpu, "why_not", lambda on_device: None if on_device else "the arrays are on the host")
    monkeypatch.setattr(interchange.Kind, "current", lambda kind: contextlib.nullcontext())


@pytest.mark.usefixtures("a_device")
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_that_nobody_knows(backend):
    """Of these a comparison raises an error."""
    environment = ShapeEnv()
    n, v = (environment.create_unbacked_symint() for _ in range(2))
    dtype, on_device = arguments.DTYPES[1], backend != "cpu"
    device = torch.device("cuda:0" if on_device else "cpu")
    outline = arguments.Outline(n, v, D, dtype, on_device, str(device), Options.of(dtype, {}))
    form = fakes._form(outline, device, None if backend == "hopper" else backend)
    assert form == backend_module(backend).statistics_form(outline)
    assert all(isinstance(size, torch.SymInt) for size in form.survivors_shape(n, v))


CASES = [
    # backend, dtype, options, tokens' dtype, rows of survivors, bytes of a row
    ("hopper", "bfloat16", {}, torch.int32, 3, 27 * 24),
    ("hopper", "float16", {"filter_eps": 2.0**-10}, torch.int32, 3, 27 * 24),
    ("hopper", "bfloat16", {"filter_c_grad": False}, torch.int32, 3, 27 * 24),
    ("hopper", "bfloat16", {"filter_eps": None}, torch.int32, 0, 0),
    ("hopper", "bfloat16", {"softcap": 5.0, "label_smoothing": 0.1}, torch.int32, 0, 0),
    ("simt", "float32", {}, torch.int64, 3, 625),
    ("simt", "float64", {}, torch.int64, 5, 625),
    ("simt", "bfloat16", {"backend": "simt"}, torch.int64, 3, 625),
    ("simt", "bfloat16", {"filter": "drop", "backend": "simt"}, torch.int64, 3, 625),
    ("hopper", "bfloat16", {"filter": "drop"}, torch.int32, 2 * 3, 27 * 24),
    ("hopper", "bfloat16", {"filter_c_grad": False, "workspace_bytes": 10**6}, torch.int32, 3, 27 * 24),
    ("hopper", "bfloat16", {"filter_eps": None, "workspace_bytes": 10**9}, torch.int32, 0, 0),
    ("hopper", "bfloat16", {"workspace_bytes": 10**9}, torch.int32, 3, 27 * 24),
    ("simt", "float32", {"filter_eps": None, "workspace_bytes": 10**9}, torch.int64, 0, 0),
]
KEPT_BYTES = {10**6: 3 * 6 * 49664, 10**9: 3 * 26 * 49664}  # of three blocks; of the vocabulary's 27 tiles evenly many


@pytest.mark.parametrize(("backend", "dtype", "options", "tokens", "rows", "row_bytes"), CASES, ids=str)
@pytest.mark.usefixtures("a_device")
def test_an_operator_on_a_device_that_is_not_there(monkeypatch, backend, dtype, options, tokens, rows, row_bytes):
    chosen = []
    module = backend_module(backend)
    form = module.statistics_form
    monkeypatch.setattr(module, "statistics_form", lambda p: chosen.append(backend) or form(p))
    given = {name: x for name, x in DEFAULTS.items() if name in operators._INTEGERS + operators._REALS + operators._WORDS}
    with FakeTensorMode(), torch.no_grad():
        e, c = (torch.empty(n, D, device="cuda", dtype=getattr(torch, dtype)) for n in (N, V))
        targets = torch.empty(N, device="cuda", dtype=torch.long)
        encoded = operators._encoded(given | options)
        found = operators.forward_op(e, c, targets, *[None] * 6, *encoded, "e,c")
        without = operators.forward_op(e, c, targets, *[None] * 6, *encoded, "")
        saved = found[1 : 1 + len(SAVED)]
        grads = operators.backward_op(found[0], *[None] * 3, *saved, e, c, targets, *[None] * 6, *encoded, "c")
    wide = torch.float64 if dtype == "float64" else torch.float32
    mean_logit = N if "label_smoothing" in options else 0
    expected = [((), wide), *[((N,), wide)] * 4, ((), torch.int64), ((N,), tokens)]
    seed = () if rows and options.get("filter") != "drop" else (0,)
    more = [((0,), wide)] * (1 + len(MORE))  # no entropy, and nothing else that was not asked for
    is_exact = options.get("filter_eps", 1) is None or "filter_c_grad" in options
    kept = KEPT_BYTES[options["workspace_bytes"]] if "workspace_bytes" in options and backend == "hopper" and is_exact else 0
    bits, none = ((rows * row_bytes,), torch.uint8), ((0,), torch.uint8)
    assert shapes(found) == [*expected, bits, ((kept,), torch.uint8), ((mean_logit,), wide), (seed, torch.int64), *more]
    assert shapes(without) == [*expected, none, none, ((mean_logit,), wide), ((0,), torch.int64), *more]
    assert shapes(grads) == [((0,), c.dtype), ((V, D), c.dtype), ((0,), c.dtype)]
    assert set(chosen) == {backend}


@pytest.mark.parametrize(("wrt", "filter_e", "filter_c", "recorded"), [
    (("e",), True, False, True), (("e",), False, True, False), (("bias",), False, True, True), ((), True, True, False),
])  # fmt: skip
def test_survivors_for_gradients_that_are_filtered(wrt, filter_e, filter_c, recorded):
    given = {"filter_e_grad": filter_e, "filter_c_grad": filter_c}
    e, c, targets = torch.empty(N, D), torch.empty(V, D), torch.empty(N, dtype=torch.long)
    _, *saved = fakes.forward(e, c, targets, torch.empty(V), given, wrt)
    assert tuple(saved[SAVED.index("survivors")].shape) == ((3 * 625,) if recorded else (0,))


def test_shapes_that_do_not_fit_are_told():
    e, c, targets = torch.empty(N, D), torch.empty(V, D), torch.empty(N, dtype=torch.long)
    for wrong, says in (((e, c.T, targets), "c:"), ((e, c, targets[1:]), "targets:")):
        with pytest.raises(ValueError, match=says):
            fakes.forward(*wrong, None, {}, ())
    with pytest.raises(ValueError, match="bias:"):
        fakes.forward(e, c, targets, torch.empty(V - 1), {}, ())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shift", [0, 2, 500])
def test_the_loss_has_the_shape_of_the_targets_that_are_left(reduction, shift):
    e, c, targets = torch.empty(2, 150, D), torch.empty(V, D), torch.empty(2, 150, dtype=torch.long)
    found = fakes.forward(e, c, targets, None, {"reduction": reduction, "shift": shift}, ())
    assert tuple(found[0].shape) == (() if reduction == "mean" else (2, max(0, 150 - shift)))
    assert tuple(found[1].shape) == (300,)


def test_dtypes_are_told_one_way():
    """Of PyTorch and of NumPy, there and back."""
    from cce_numba.torch import memory

    for dtype in (*arguments.DTYPES, np.dtype(np.uint8), np.dtype(np.int32), np.dtype(np.int64)):
        assert memory.NUMPY_DTYPES[memory.TORCH_DTYPES[dtype]] == dtype
