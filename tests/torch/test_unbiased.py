"""The unbiased filter through PyTorch: the same bits as arrays get, whoever records; seeds that change cost no new program."""

from __future__ import annotations

import numpy as np
import pytest

import cce_numba as cce

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
cct = pytest.importorskip("cce_numba.torch")

N, V, D = 200, 700, 8
OPTIONS = {"filter": "unbiased", "filter_eps": 2.0**-5, "reduction": "sum"}


def problem(dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    e, c = torch.randn(N, D, device=device, dtype=dtype), torch.randn(V, D, device=device, dtype=dtype) / 2
    targets = torch.randint(0, V, (N,), device=device)
    targets[::5] = -100
    return e.requires_grad_(), c.requires_grad_(), targets


def gradients(function=cct.linear_cross_entropy, **options):
    e, c, targets = problem()
    function(e, c, targets, **OPTIONS | options).backward()
    return e.grad, c.grad


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("seed", [0, 3, -1, 2**40 + 3])
def test_gradients_are_those_of_arrays(seed):
    arrays = [x.detach().numpy() for x in problem()]
    _, expected = cce.linear_cross_entropy_with_grad(*arrays, **OPTIONS, filter_seed=seed)
    for given in (seed, torch.tensor(seed)):
        ours = gradients(filter_seed=given)
        np.testing.assert_array_equal(ours[0].numpy(), expected.e)
        np.testing.assert_array_equal(ours[1].numpy(), expected.c)


def test_seeds_draw_anew_and_inputs_draw_the_same():
    assert same(gradients(filter_seed=1), gradients(filter_seed=1))
    assert not same(gradients(filter_seed=1), gradients(filter_seed=2))
    assert not same(gradients(), gradients(filter="drop"))
    assert same(gradients(filter="drop"), gradients(filter="drop", filter_seed=2))


def test_a_seed_may_change_between_forward_and_backward():
    """As in a loop that counts its steps in place. The backward has the seed that the forward drew by."""
    e, c, targets = problem()
    seed = torch.tensor(1)
    loss = cct.linear_cross_entropy(e, c, targets, **OPTIONS, filter_seed=seed)
    seed += 1
    loss.backward()
    assert same((e.grad, c.grad), gradients(filter_seed=1))


def test_recomputation_draws_the_same():
    def checkpointed(e, c, targets, **options):
        return torch.utils.checkpoint.checkpoint(
            lambda e: cct.linear_cross_entropy(e, c, targets, **options), e, use_reentrant=False
        )

    assert same(gradients(checkpointed), gradients())


def test_compiled_with_seeds_that_change():
    """Integers become symbols, tensors stay tensors: two programs for integers, one for tensors, and the same bits."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(cct.linear_cross_entropy, fullgraph=True, backend=counter)
    for seed in range(5):
        assert same(gradients(compiled, filter_seed=seed), gradients(filter_seed=seed))
    assert counter.frame_count <= 3  # 0, 1, and a symbol: compilers take 0 and 1 for constants
    torch._dynamo.reset()
    counter.clear()
    for seed in range(5):
        assert same(gradients(compiled, filter_seed=torch.tensor(seed)), gradients(filter_seed=seed))
    assert counter.frame_count == 1


@pytest.mark.parametrize("seed", [0, 7, torch.tensor(7)], ids=str)
def test_opcheck(seed, monkeypatch):
    from cce_numba.torch import autograd, operators

    calls = {}
    for name in ("forward_op", "backward_op"):
        operator = getattr(operators, name)
        monkeypatch.setattr(operators, name, lambda *args, n=name, o=operator: calls.setdefault(n, args) and o(*args))
    monkeypatch.setattr(autograd, "is_watched", lambda tensors: True)
    watched = gradients(filter_seed=seed)
    monkeypatch.undo()
    assert same(watched, gradients(filter_seed=seed))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(operators.forward_op, calls["forward_op"], test_utils=tests)
    detached = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in calls["backward_op"])
    torch.library.opcheck(operators.backward_op, detached, test_utils=tests)


def test_meta_tensors():
    e, c, targets = (x.detach().to("meta").requires_grad_(x.requires_grad) for x in problem())
    cct.linear_cross_entropy(e, c, targets, **OPTIONS, filter_seed=3).backward()
    assert e.grad.shape == (N, D)


def test_a_module_and_a_backward_in_place():
    module = cct.LinearCrossEntropy(**OPTIONS, filter_seed=torch.tensor(1))
    assert dict(module.named_buffers())["filter_seed"] == 1
    assert not module.state_dict()
    module.filter_seed += 1
    e, c, targets = problem()
    module(e, c, targets).backward()
    assert same((e.grad, c.grad), gradients(filter_seed=2))
    assert "filter_eps=0.03125, filter_seed=<torch.int64 ()>" in repr(module)
    assert "filter='drop'" in repr(cct.LinearCrossEntropy(filter="drop"))
    e, c, targets = problem()
    cct.linear_cross_entropy_backward(e, c, targets, **OPTIONS, filter_seed=2)
    assert same((e.grad, c.grad), gradients(filter_seed=2))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"filter": "biased"}, ValueError, "filter: must be one of 'drop', 'unbiased', got 'biased'"),
        ({"filter": None}, ValueError, "filter: must be one of"),
        ({"filter_seed": 1.5}, TypeError, "filter_seed: must be an integer, got 1.5"),
        ({"filter_seed": 2**64}, ValueError, "filter_seed: must fit in 64 bits"),
        (
            {"filter_seed": torch.tensor(1.0)},
            TypeError,
            "filter_seed: must be .* 0-d tensor of one, got dtype float32",
        ),
        ({"filter_seed": torch.tensor([1])}, ValueError, r"filter_seed: must be .*, got shape \(1,\)"),
        ({"filter_seed": torch.tensor(1, device="meta")}, ValueError, "filter_seed: must be on the device of e, cpu"),
    ],
    ids=str,
)
def test_errors(given, error, message):
    with pytest.raises(error, match=message):
        cct.linear_cross_entropy(*problem(), **given)
