"""`linear_logprobs` and the extras beside a loss: gradients by autograd, under compilers, and against stored logits."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import cce_numba as cce  # noqa: E402
import cce_numba.torch as cct  # noqa: E402

N, V, D, IGNORE = 7, 23, 5, -100


def inputs(seed=0, dtype=torch.float64, K=3, shape=(N,), entries=V):
    generator = torch.Generator().manual_seed(seed)
    e = torch.randn(*shape, D, generator=generator, dtype=dtype)
    c = torch.randn(entries, D, generator=generator, dtype=dtype)
    bias = torch.randn(entries, generator=generator, dtype=dtype)
    ids = torch.randint(0, entries, shape if K is None else (*shape, K), generator=generator)
    ids.view(-1, 1 if K is None else K)[1] = IGNORE
    if K is not None and K > 1:
        ids[..., 1][torch.rand(shape, generator=generator) < 0.4] = IGNORE
    return e.requires_grad_(), c.requires_grad_(), ids, bias.requires_grad_()


def stored(e, c, ids, bias, *, logit_scale=1.0, softcap=None, shift=0):
    """`(logprobs, lse, entropy, sum_squares, log_p)` from stored logits, by plain PyTorch; 0 where ignored or padded."""
    if shift:
        e, ids = e[..., :-shift, :], ids[:, shift:]
    z = (e @ c.T + bias) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p = z.log_softmax(-1)
    many = ids if ids.ndim == e.ndim else ids[..., None]
    present = many != IGNORE
    counts = present.any(-1)
    logprobs = torch.where(present, log_p.gather(-1, many.where(present, 0)), 0)
    entropy = -(log_p.exp() * log_p).sum(-1)
    numbers = (z.logsumexp(-1), entropy, (2 * log_p).exp().sum(-1))
    return logprobs.reshape(ids.shape), *(torch.where(counts, x, 0) for x in numbers), log_p


@pytest.fixture(params=["function", "operator"])
def recorded(request, monkeypatch):
    """By autograd's own function, and by the operator that compilers see."""
    if request.param == "operator":
        from cce_numba.torch import autograd

        monkeypatch.setattr(autograd, "is_watched", lambda tensors: True)


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("K", [None, 1, 3])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(K, softcap):
    e, c, ids, bias = inputs(K=K)

    def of(e, c, bias):
        found = cct.linear_logprobs(e, c, ids, bias=bias, entropy=True, softcap=softcap, logit_scale=0.7, filter_eps=None)
        return found.logprobs, found.lse, found.entropy

    assert torch.autograd.gradcheck(of, (e, c, bias))


@pytest.mark.usefixtures("recorded")
def test_gradcheck_of_soft_targets():
    e, c, ids, bias = inputs()
    probs = torch.rand(ids.shape, dtype=torch.float64)

    def of(e, c, bias):
        options = {"label_smoothing": 0.1, "z_loss": 0.1, "filter_eps": None, "entropy": True}
        found = cct.linear_cross_entropy(e, c, ids, bias, target_probs=probs, **options)
        return found.loss, found.lse, found.entropy

    assert torch.autograd.gradcheck(of, (e, c, bias))


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("K", [None, 3])
def test_against_stored_logits(K, shift):
    e, c, ids, bias = inputs(K=K, shape=(2, 6))
    options = {"softcap": 4.0, "shift": shift}
    scale = torch.rand(2, 6, dtype=torch.float64) + 0.5
    found = cct.linear_logprobs(
        e, c, ids, bias=bias, logit_scale=scale, entropy=True, sum_squares=True, top_k=4, filter_eps=None, **options
    )
    assert isinstance(found, cce.Logprobs)
    scale = scale[:, : 6 - shift, None]
    logprobs, lse, entropy, sum_squares, log_p = stored(e, c, ids, bias, logit_scale=scale, **options)
    for actual, expected in zip(found[:4], (logprobs, lse, entropy, sum_squares), strict=True):
        torch.testing.assert_close(actual, expected)
    counts = found.lse != 0
    best = log_p.topk(4)
    assert torch.equal(found.top_ids[counts], best.indices[counts])
    torch.testing.assert_close(found.top_logprobs[counts], best.values[counts].detach())
    assert [x.requires_grad for x in found] == [True, True, True, False, False, False]
    weight = torch.randn(logprobs.shape, dtype=torch.float64)
    actual, expected = (
        torch.autograd.grad((weight * x[0]).sum() + (x[1] ** 2).sum() - 0.3 * x[2].exp().sum(), (e, c, bias))
        for x in (found, (logprobs, lse, entropy))
    )
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_each_upstream_gradient_alone():
    e, c, ids, bias = inputs()
    found = cct.linear_logprobs(e, c, ids, bias=bias, entropy=True, filter_eps=None)
    expected = stored(e, c, ids, bias)
    for a, b in zip(found[:3], expected, strict=False):
        for x, y in zip(*(torch.autograd.grad(z.square().sum(), (e, c, bias), retain_graph=True) for z in (a, b)), strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    e, c, ids, bias = inputs(dtype=torch.float32)

    def step(e, c, ids, bias):
        found = cct.linear_logprobs(e, c, ids, bias=bias, entropy=True, sum_squares=True, top_k=2)
        ratio = (found.logprobs - found.logprobs.detach()).exp()
        return found, ratio.sum() - 0.01 * found.entropy.sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in (N, N + 3):
        e, c, ids, bias = inputs(dtype=torch.float32, shape=(shape,))
        (found, loss), (expected, other) = compiled(e, c, ids, bias), step(e, c, ids, bias)
        assert type(found) is cce.Logprobs
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(torch.autograd.grad(loss, (e, c, bias)), torch.autograd.grad(other, (e, c, bias)), strict=True):
            assert torch.equal(a, b)


def test_compiled_beside_a_loss():
    e, c, ids, bias = inputs(dtype=torch.float32)
    probs = torch.rand(ids.shape)

    def step(e, c, ids, bias):
        return cct.linear_cross_entropy(e, c, ids, bias, target_probs=probs, entropy=True, top_k=1)

    torch._dynamo.reset()
    found, expected = torch.compile(step, fullgraph=True, backend="aot_eager")(e, c, ids, bias), step(e, c, ids, bias)
    assert type(found) is cce.LossStatistics
    assert found.sum_squares is None
    for name in ("loss", "lse", "entropy", "top_logprobs", "top_ids"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    grads = [torch.autograd.grad(x.loss + x.entropy.sum(), (e, c, bias)) for x in (found, expected)]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("K", [None, 2])
def test_opcheck(K, monkeypatch):
    from cce_numba.torch import autograd, operators

    calls = {}
    for name in ("forward_op", "backward_op"):
        operator = getattr(operators, name)
        monkeypatch.setattr(operators, name, lambda *args, n=name, o=operator: calls.setdefault(n, args) and o(*args))
    monkeypatch.setattr(autograd, "is_watched", lambda tensors: True)
    e, c, ids, bias = inputs(K=K, dtype=torch.float32)
    found = cct.linear_logprobs(e, c, ids, bias=bias, entropy=True, sum_squares=True, top_k=2)
    (found.logprobs.sum() + found.entropy.sum()).backward()
    monkeypatch.undo()
    torch.library.opcheck(operators.forward_op, calls["forward_op"])
    detached = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in calls["backward_op"])
    torch.library.opcheck(operators.backward_op, detached)


@settings(max_examples=30)
@given(seed=st.integers(0, 99), K=st.sampled_from([None, 1, 4]), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_as_arrays_have_them(seed, K, dtype):
    """The one driver has computed both."""
    e, c, ids, _ = inputs(seed, dtype=dtype, K=K, entries=40)
    options = {"entropy": True, "sum_squares": True, "top_k": 3}
    found = cct.linear_logprobs(e, c, ids, **options)
    arrays = cce.linear_logprobs(e.detach(), c.detach(), ids, **options)
    for a, b in zip(found, arrays, strict=True):
        assert torch.equal(a, b)


def test_without_gradients_nothing_is_kept():
    e, c, ids, _ = inputs()
    with torch.no_grad():
        found = cct.linear_logprobs(e, c, ids, entropy=True)
    assert not any(x.requires_grad for x in found if x is not None)
    torch.testing.assert_close(found.logprobs, cct.linear_logprobs(e, c, ids).logprobs.detach())


def test_a_module_and_a_backward_in_place():
    e, c, ids, _ = inputs(K=None)
    criterion = cct.LinearCrossEntropy(entropy=True, top_k=1, reduction="sum")
    found = criterion(e, c, ids)
    assert isinstance(found, cce.LossStatistics)
    found.loss.backward()
    grads = e.grad.clone(), c.grad.clone()
    e.grad = c.grad = None
    other = cct.linear_cross_entropy_backward(e, c, ids, entropy=True, top_k=1, reduction="sum")
    assert torch.equal(other.top_ids, found.top_ids)
    assert torch.equal(other.entropy, found.entropy.detach())
    for a, b in zip(grads, (e.grad, c.grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("error", "named", "says"),
    [
        (TypeError, {"temperature": 0.5}, ["temperature:", "logit_scale"]),
        (TypeError, {"reduction": "sum"}, ["reduction:", "is not an option"]),
        (TypeError, {"entropy": 1}, ["entropy:", "True or False"]),
        (ValueError, {"top_k": -1}, ["top_k:", ">= 0"]),
        (ValueError, {"top_k": V + 1}, ["top_k:", f"V = {V}"]),
        (TypeError, {"top_k": 1.5}, ["top_k:", "integer"]),
    ],
)
def test_what_does_not_fit(error, named, says):
    e, c, ids, _ = inputs()
    for function, arrays in (
        (cct.linear_logprobs, (e, c, ids)),
        (cce.linear_logprobs, [x.detach().numpy() for x in (e, c, ids)]),
    ):
        with pytest.raises(error) as raised:
            function(*arrays, **named)
        for part in says:
            assert part in str(raised.value) or part == "is not an option", str(raised.value)


def test_ids_that_do_not_fit():
    e, c, ids, _ = inputs()
    for wrong, says in ((ids[:3], "ids: must have"), (ids.double(), "ids: must be integers"), (ids + V, "ids: must lie in")):
        with pytest.raises((TypeError, ValueError), match=says):
            cct.linear_logprobs(e, c, wrong)
