"""The operators: what PyTorch is told of them is true; what looks at operators sees them, and nothing else pays for them."""

from __future__ import annotations

import contextlib
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
cct = pytest.importorskip("cce_numba.torch")
from torch.autograd import forward_ad  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

N, V, D = 200, 3000, 16


def problem(device="cpu", dtype=torch.float32):
    """e, c, targets, bias: two blocks of tokens, of which some do not count."""
    torch.manual_seed(0)
    e, c, bias = torch.randn(N, D), torch.randn(V, D) / 2, torch.randn(V)
    targets = torch.randint(0, V, (N,))
    targets[::5] = -100
    e, c = (x.to(device, dtype).requires_grad_() for x in (e, c))
    return e, c, targets.to(device), bias.to(device).requires_grad_()


@pytest.fixture
def used(monkeypatch):
    """Which operators were called, and with what."""
    from cce_numba.torch import operators

    calls = {}
    for name in ("forward_op", "backward_op"):
        operator = getattr(operators, name)
        monkeypatch.setattr(operators, name, lambda *args, n=name, o=operator: calls.setdefault(n, args) and o(*args))
    return calls


@pytest.mark.parametrize(
    ("dtype", "options"),
    [  # each takes some 10 s, so each option comes with one dtype
        (torch.bfloat16, {}),
        (torch.float32, {"filter_eps": None, "reduction": "sum"}),
        (torch.bfloat16, {"filter_eps": 2.0**-4, "shift": 2, "reduction": "none"}),
        (torch.float32, {"softcap": 5.0, "label_smoothing": 0.1}),
        (torch.bfloat16, {"logit_scale": 0.5, "z_loss": 0.1, "class_weights": "entries", "token_weights": "tokens"}),
        (torch.float32, {"logit_scale": "tokens"}),
    ],
    ids=str,
)
def test_opcheck(device, options, dtype, used, monkeypatch):
    """Schemas tell the truth, fakes' shapes and strides are the operators', and autograd is registered as it must be."""
    from cce_numba.torch import autograd, operators

    sizes = {"tokens": N, "entries": V}
    options = {k: torch.rand(sizes[v], device=device) + 0.1 if v in sizes else v for k, v in options.items()}
    monkeypatch.setattr(autograd, "is_watched", lambda tensors: True)
    loss, lse = cct.linear_cross_entropy(*problem(device, dtype), return_lse=True, **options)
    (loss.sum() + lse.sum()).backward()
    monkeypatch.undo()
    torch.library.opcheck(operators.forward_op, used["forward_op"])
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in used["backward_op"]]
    torch.library.opcheck(operators.backward_op, tuple(detached))


@pytest.mark.parametrize("filter_eps", ["auto", 2.0**-16, None])
def test_options_are_the_same_once_decoded(filter_eps):
    """So a filter that nobody chose is not taken for one of the same threshold."""
    from cce_numba.interchange import BFLOAT16
    from cce_numba.options import DEFAULTS, Options
    from cce_numba.torch import call, operators

    numbers = {name: value for name, value in DEFAULTS.items() if name in operators._INTEGERS + operators._REALS}
    words = {"reduction": "sum", "backend": "cpu", "filter": "unbiased", "filter_eps": filter_eps}
    options = numbers | words | {"filter_c_grad": False, "shift": 3}
    decoded = operators._decoded(*operators._encoded(options | {"softcap": 5.0, "check_targets": True}))
    assert decoded == options | {"softcap": 5.0, "check_targets": True}
    checked = Options.of(BFLOAT16, call.given(decoded))
    assert checked.filter_eps == {"auto": 2.0**-12}.get(filter_eps, filter_eps)
    assert checked.filter_is_auto == (filter_eps == "auto")


@pytest.fixture
def two_rows(monkeypatch):
    """The CPU's forward leaves two rows of survivors for each block, as Hopper's does: its own, then others. Counts them."""
    from cce_numba.cpu import backend

    forward, form, made = backend.forward, backend.statistics_form, []

    def has_two(p):
        return p.options.filter_is_auto and p.options.filter_c_grad

    def with_others(p, plan, *, record_survivors, keep_logits):
        statistics = forward(p, plan, record_survivors=record_survivors, keep_logits=keep_logits)
        if not (record_survivors and has_two(p)):
            return statistics
        bits = statistics.survivors
        if bits is None:
            bits = np.full((-(-p.N // statistics.survivor_block), -(-p.V // 8)), 255, np.uint8)
        made.append(len(bits))
        return dataclasses.replace(statistics, survivors=np.concatenate([bits, np.full_like(bits, 0x55)]))

    monkeypatch.setattr(backend, "forward", with_others)
    monkeypatch.setattr(backend, "statistics_form", lambda p: dataclasses.replace(form(p), planes=2 if has_two(p) else 1))
    return made


@pytest.mark.parametrize("options", [{}, {"filter_c_grad": False}, {"filter_e_grad": False}, {"filter_eps": 2.0**-16}], ids=str)
def test_two_rows_for_each_block(options, two_rows, request):
    """Fakes know them, autograd keeps them, and gradients are those of the filter's own."""
    from cce_numba.torch.operators import backward_op, forward_op

    def gradients(function):
        e, c, targets, bias = problem(dtype=torch.bfloat16)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
            loss = function(e, c, targets.abs(), bias, **options)
        loss.backward()
        assert ((4 if has_two else 2) * 375,) in kept, "survivors"
        return grads_of((e, c, bias))

    has_two = "filter_eps" not in options and options.get("filter_c_grad", True)
    plain = gradients(cct.linear_cross_entropy)
    assert two_rows == ([2] if has_two else [])
    torch._dynamo.reset()
    compiled = gradients(torch.compile(cct.linear_cross_entropy, fullgraph=True, backend="aot_eager"))
    used = request.getfixturevalue("used")
    with Names():
        watched = gradients(cct.linear_cross_entropy)
    torch.library.opcheck(forward_op, used["forward_op"])
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in used["backward_op"]]
    torch.library.opcheck(backward_op, tuple(detached))
    for a, b, c in zip(plain, compiled, watched, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("block_rows", [1, 2])
def test_rows_of_a_device_are_kept_whole(block_rows, monkeypatch):
    """They go on after the last entry. With a tensor of the CPU that says that it is on a device; nothing reads it."""
    pytest.importorskip("cupy", reason="CuPy is not installed")
    from cce_numba import interchange
    from cce_numba.backend import Statistics, StatisticsForm
    from cce_numba.torch import call, memory

    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 0)
    given = torch.arange(3 * block_rows * 144, dtype=torch.uint8).reshape(-1, 144)
    per_token, n_valid, tokens = torch.zeros(300), torch.tensor(300), torch.arange(300, dtype=torch.int32)
    lse, count, listed, bits = map(interchange.of_cuda_tensor, (per_token, n_valid, tokens, given))
    p = SimpleNamespace(N=300, V=1000, on_device=True, options=SimpleNamespace(smooths_capped=False))
    form = StatisticsForm(np.dtype(np.int32), survivor_block=128, planes=block_rows, row_unit_bytes=24)
    arrays = call._saved(p, form, Statistics(listed, count, lse, lse, lse, lse, bits[:, :125], 128), True)
    saved = [memory.tensor_of(array) for array in arrays]
    kept = saved[call.SAVED.index("survivors")]
    assert kept.data_ptr() == given.data_ptr()
    assert torch.equal(kept, given.flatten())
    survivors = call._statistics(p, form, saved).survivors
    np.testing.assert_array_equal(survivors, given.numpy()[:, :125])
    assert survivors.strides == (144, 1)


class Names(TorchDispatchMode):
    """The operators that are called inside."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.name())
        return function(*args, **(kwargs or {}))

    def ours(self):
        return [name for name in self.seen if name.startswith("cce_numba")]


class Labelled(torch.Tensor):
    """A tensor of another class."""


def grads_of(tensors):
    return [x.grad for x in tensors if x.requires_grad]


def assert_same_grads(tensors):
    expected = problem()
    cct.linear_cross_entropy(*expected).backward()
    for a, b in zip(grads_of(tensors), grads_of(expected), strict=True):
        assert torch.equal(a, b)


def test_nobody_looks(used):
    tensors = problem()
    cct.linear_cross_entropy(*tensors).backward()
    cct.linear_cross_entropy(*tensors[:3], torch.nn.Parameter(tensors[3])).backward()
    with torch.no_grad():
        cct.linear_cross_entropy(*tensors)
    assert not used


@pytest.mark.parametrize("forward_seen", [False, True])
@pytest.mark.parametrize("backward_seen", [False, True])
def test_a_mode_sees_what_is_called_inside(forward_seen, backward_seen):
    tensors, names = problem(), Names()
    with names if forward_seen else contextlib.nullcontext():
        loss = cct.linear_cross_entropy(*tensors)
    with names if backward_seen else contextlib.nullcontext():
        loss.backward()
    forward, backward = "cce_numba::linear_cross_entropy", "cce_numba::linear_cross_entropy_backward"
    assert names.ours() == [forward] * forward_seen + [backward] * backward_seen
    assert_same_grads(tensors)


def test_a_tensor_of_another_class_stays_one(used):
    tensors = problem()
    loss = cct.linear_cross_entropy(tensors[0].as_subclass(Labelled), *tensors[1:])
    assert type(loss) is Labelled
    loss.backward()
    assert used.keys() == {"forward_op", "backward_op"}
    assert_same_grads(tensors)


def test_fake_tensors():
    from torch._subclasses import FakeTensorMode

    real = problem()
    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(x) for x in real]
        loss = cct.linear_cross_entropy(*tensors, reduction="none")
        assert loss.shape == (N,)
        loss.sum().backward()
    for a, b in zip(grads_of(tensors), [x for x in real if x.requires_grad], strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_second_derivatives_are_refused_by_the_operator(used):
    tensors = problem()
    torch.autograd.grad(cct.linear_cross_entropy(*tensors), tensors[0], create_graph=True)
    assert used.keys() == {"backward_op"}


@pytest.mark.parametrize("grad", [False, True])
def test_a_graph_has_the_operators(grad):
    from torch.fx.experimental.proxy_tensor import make_fx

    def function(e, c, targets, bias):
        e = e.detach().requires_grad_(grad)
        loss = cct.linear_cross_entropy(e, c.detach(), targets, bias.detach())
        return torch.autograd.grad(loss, e) if grad else loss

    graph = make_fx(function)(*problem())
    called = [node.target for node in graph.graph.nodes if "cce_numba" in str(node.target)]
    assert len(called) == 1 + grad
    assert torch.equal(*(x if grad is False else x[0] for x in (graph(*problem()), function(*problem()))))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_has_the_operator():
    e, c, targets, _ = (x.detach() for x in problem())
    traced = torch.jit.trace(cct.linear_cross_entropy, (e, c, targets))
    assert "cce_numba::linear_cross_entropy" in str(traced.graph)
    assert torch.equal(traced(2 * e, c, targets), cct.linear_cross_entropy(2 * e, c, targets))


def test_vmap():
    e, c, targets, bias = (x.detach() for x in problem())
    batched = torch.func.vmap(lambda e: cct.linear_cross_entropy(e, c, targets, bias))(torch.stack([e, 2 * e]))
    assert torch.equal(batched, torch.stack([cct.linear_cross_entropy(x, c, targets, bias) for x in (e, 2 * e)]))


@pytest.mark.parametrize("needed", ["ecb", "e", "c", ""])
def test_flops_are_those_of_the_products(needed):
    """Of all entries: what survives is not known beforehand. The logits are made twice, which PyTorch's own loss keeps."""
    from torch.utils.flop_counter import FlopCounterMode

    e, c, targets, bias = (x.detach() for x in problem())
    for name, x in zip("ecb", (e, c, bias), strict=True):
        x.requires_grad_(name in needed)
    counted = {}
    for impl in ("cce", "torch_compile"):
        with FlopCounterMode(display=False) as counter:
            loss = cct.linear_cross_entropy(e, c, targets, bias, impl=impl)
            if needed:
                loss.backward()
        counted[impl] = counter.get_total_flops()
    assert counted["cce"] == counted["torch_compile"] + (2 * N * V * D if needed else 0)
    assert counted["torch_compile"] == 2 * N * V * D * (1 + ("e" in needed) + ("c" in needed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{"reduction": "none", "shift": 2}, {"softcap": 5.0, "label_smoothing": 0.1}], ids=str)
def test_meta_tensors_give_shapes(options, dtype):
    """Of a step that is too large to run here, as FSDP's and accelerate's models are made."""

    def step(e, c, targets, bias):
        loss, lse = cct.linear_cross_entropy(e, c, targets, bias, return_lse=True, **options)
        (loss.sum() + lse.sum()).backward()
        return [loss, lse, e.grad, c.grad, bias.grad]

    real = problem(dtype=dtype)
    on_meta = [x.detach().to("meta").requires_grad_(x.requires_grad) for x in real]
    for a, b in zip(step(*on_meta), step(*real), strict=True):
        assert a.is_meta
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    huge = torch.empty(10**6, 4096, device="meta"), torch.empty(256_000, 4096, device="meta")
    assert cct.linear_cross_entropy(*huge, torch.empty(10**6, device="meta", dtype=torch.long)).shape == ()


def forward_mode(loss_of, e, seen=True):
    """With an onlooker, so that the operator is called, or without."""
    with forward_ad.dual_level(), Names() if seen else contextlib.nullcontext():
        return forward_ad.unpack_dual(loss_of(forward_ad.make_dual(e, e)))


@pytest.mark.parametrize(
    "transform",
    [
        lambda loss_of, e: torch.func.grad(loss_of)(e),
        lambda loss_of, e: torch.func.vjp(loss_of, e),
        lambda loss_of, e: torch.func.jvp(loss_of, (e,), (e,)),  # an operator would be a constant
        lambda loss_of, e: torch.func.vmap(torch.func.grad(loss_of))(torch.stack([e, e])),
        lambda loss_of, e: torch.func.hessian(loss_of)(e),
        lambda loss_of, e: forward_mode(loss_of, e),
        lambda loss_of, e: forward_mode(loss_of, e, seen=False),
        lambda loss_of, e: torch.autograd.functional.jacobian(loss_of, e, vectorize=True, strategy="forward-mode"),
    ],
    ids=["grad", "vjp", "jvp", "vmap of grad", "hessian", "forward mode", "forward mode, unseen", "jacobian"],
)
def test_transforms_that_differentiate_are_refused(transform):
    e, c, targets, _ = (x[:9].detach() for x in problem())
    targets = targets % 9

    def loss_of(e, **options):
        return cct.linear_cross_entropy(e, c, targets, **options)

    with pytest.raises(NotImplementedError, match=r"torch\.func cannot differentiate it.*impl='torch_compile'"):
        transform(loss_of, e)
    transform(lambda e: loss_of(e, impl="torch_compile"), e)
