"""How the adapter behaves in PyTorch's machinery: what is recorded, kept, recomputed, cast, and refused."""

from __future__ import annotations

import itertools
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

import cce_numba as cce
from cce_numba import driver
from cce_numba.backend import backend_module
from cce_numba.driver import ForwardPass

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
cct = pytest.importorskip("cce_numba.torch")
from torch.utils.checkpoint import checkpoint  # noqa: E402

pytestmark = pytest.mark.usefixtures("way")

N, V, D = 200, 3000, 16


@pytest.fixture
def inputs(device):
    """e, c, targets, bias: two blocks of tokens, of which some do not count."""
    torch.manual_seed(0)
    e, c, bias = torch.randn(N, D), torch.randn(V, D) / 2, torch.randn(V)
    targets = torch.randint(0, V, (N,))
    targets[::5] = -100
    return [x.to(device) for x in (e, c, targets, bias)]


def leaves(inputs, dtype=torch.float32):
    e, c, targets, bias = inputs
    return [*(x.detach().to(dtype, copy=True).requires_grad_() for x in (e, c)), targets, bias.clone().requires_grad_()]


def grads_of(tensors):
    return [x.grad for x in tensors if x.is_floating_point()]


@pytest.mark.parametrize("needed", [set(names) for n in (1, 2, 3) for names in itertools.combinations("ecb", n)], ids=sorted)
def test_only_what_requires_grad(inputs, needed, monkeypatch):
    tensors = leaves(inputs)
    cct.linear_cross_entropy(*tensors, filter_eps=2.0**-4).backward()
    expected = dict(zip("ecb", grads_of(tensors), strict=True))
    asked = []
    original = ForwardPass.backward
    monkeypatch.setattr(
        ForwardPass, "backward", lambda *args, **named: asked.append(args[-1].wanted) or original(*args, **named)
    )
    some = leaves(inputs)
    for name, x in zip("ecb", [some[0], some[1], some[3]], strict=True):
        x.requires_grad_(name in needed)
    cct.linear_cross_entropy(*some, filter_eps=2.0**-4).backward()
    assert asked == [{{"b": "bias"}.get(name, name) for name in needed}]
    for name, grad in zip("ecb", grads_of(some), strict=True):
        assert (grad is None) == (name not in needed)
        assert grad is None or torch.equal(grad, expected[name])


def test_nothing_requires_grad(inputs):
    loss = cct.linear_cross_entropy(*inputs)
    assert not loss.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_nothing_is_kept_and_no_survivors_are_made(inputs, mode, monkeypatch):
    recorded = []

    def watched(name):
        module = backend_module(name)

        def forward(p, plan, *, record_survivors, keep_logits):
            recorded.append(record_survivors)
            return module.forward(p, plan, record_survivors=record_survivors, keep_logits=keep_logits)

        return SimpleNamespace(**(vars(module) | {"forward": forward}))

    monkeypatch.setattr(driver, "backend_module", watched)
    tensors = leaves(inputs)
    with mode():
        loss = cct.linear_cross_entropy(*tensors)
    assert recorded == [False]
    assert not loss.requires_grad
    assert loss.grad_fn is None
    loss = cct.linear_cross_entropy(*tensors)
    assert recorded == [False, True]
    assert loss.requires_grad
    cct.linear_cross_entropy(*tensors, filter_eps=None)
    cct.linear_cross_entropy(tensors[0].detach(), *tensors[1:], filter_c_grad=False)
    cct.linear_cross_entropy(*tensors, softcap=5.0, label_smoothing=0.1)
    assert recorded[2:] == [False] * 3


def test_what_is_kept_is_small(inputs):
    """Besides the inputs themselves: a few numbers a token, and a bit for 128 of them and an entry."""
    kept = []
    tensors = leaves(inputs)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        cct.linear_cross_entropy(*tensors)
    inputs_bytes = {x.data_ptr() for x in tensors}
    extra = sum(x.nbytes for x in kept if x.data_ptr() not in inputs_bytes)
    assert extra <= 24 * N + 2 * 2 * (V // 8 + 24)
    assert len(kept) >= 8


def test_the_large_ones_go_with_the_backward():
    """The loss, which keeps its graph, is often kept: to be shown, or summed up."""
    arrays = [np.ones((8, D), np.float32), np.ones((50, D), np.float32)]
    watched, leaf = [weakref.ref(x) for x in arrays], torch.zeros((), requires_grad=True)
    tensors = [torch.from_numpy(x).add_(leaf) for x in arrays]
    loss = cct.linear_cross_entropy(*tensors, torch.zeros(8, dtype=torch.long))
    del arrays, tensors
    assert all(reference() is not None for reference in watched)
    loss.backward()
    assert not any(reference() is not None for reference in watched)


@pytest.mark.parametrize("with_grad", [True, False])
def test_what_a_backward_would_want_is_made_for_one_alone(inputs, with_grad, way, monkeypatch):
    from cce_numba.torch import memory

    made = []
    of_one, of_blocks = memory.tensor_of, memory.blocks_of
    monkeypatch.setattr(memory, "tensor_of", lambda array: made.append(array) or of_one(array))
    monkeypatch.setattr(memory, "blocks_of", lambda arrays: made.extend(arrays) or of_blocks(arrays))  # on a device
    with torch.set_grad_enabled(with_grad):
        cct.linear_cross_entropy(*leaves(inputs))
    assert (len(made) > 2) == (with_grad or way == "operator")


def test_saved_tensors_may_be_packed(inputs):
    """Strides and addresses may change between forward and backward, as when activations are offloaded."""
    tensors, other = leaves(inputs), leaves(inputs)
    cct.linear_cross_entropy(*tensors, filter_eps=2.0**-4).backward()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (x.device, x.cpu().clone(memory_format=torch.contiguous_format)), lambda packed: packed[1].to(packed[0])
    ):
        loss = cct.linear_cross_entropy(*other, filter_eps=2.0**-4)
    loss.backward()
    for a, b in zip(grads_of(tensors), grads_of(other), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "label_smoothing": 0.1}, {"filter_eps": 2.0**-4}], ids=str)
def test_what_is_kept_is_taken_again_from_autograd(inputs, options):
    """Between forward and backward FSDP fills a parameter's memory with something else, and gathers the parameter elsewhere."""

    def gradients(spoilt):
        e, c, targets, bias = leaves([x.clone() for x in inputs])
        more = [torch.linspace(0.5, 1.5, n, device=e.device) for n in (N, V, N)]
        given = dict(zip(("logit_scale", "class_weights", "token_weights"), more, strict=True))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()):
            loss = cct.linear_cross_entropy(e, c, targets, bias, **given, **options)
        for x in (e, c, targets, bias, *more) if spoilt else ():
            x.detach().fill_(7)
        loss.backward()
        return e.grad, c.grad, bias.grad

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(a, b)
        assert b.abs().max() > 0


@pytest.mark.parametrize("freed", range(4))
def test_memory_that_was_freed_is_not_read(inputs, freed):
    tensors = [x.detach() for x in leaves(inputs)]
    tensors[freed].untyped_storage().resize_(0)
    name = ("e", "c", "targets", "bias")[freed]
    with pytest.raises(ValueError, match=f"{name}: its memory was freed; of a parameter that FSDP shards"):
        cct.linear_cross_entropy(*tensors)


def test_the_lse_alone(inputs):
    tensors, exact = leaves(inputs, torch.float64), leaves(inputs, torch.float64)
    tensors[3], exact[3] = (x[3].detach().double().requires_grad_() for x in (tensors, exact))
    _, lse = cct.linear_cross_entropy(*tensors, return_lse=True, filter_eps=None)
    (lse * lse).sum().backward()
    e, c, targets, bias = exact
    expected = (e @ c.T + bias).logsumexp(-1)[targets != -100]
    (expected * expected).sum().backward()
    for a, b in zip(grads_of(tensors), grads_of(exact), strict=True):
        torch.testing.assert_close(a, b)


def test_upstream_gradients_of_zero_and_of_one_of_two_calls(inputs):
    tensors = leaves(inputs)
    first, second = (cct.linear_cross_entropy(*tensors) for _ in range(2))
    (0 * first + second).backward()
    alone = leaves(inputs)
    cct.linear_cross_entropy(*alone).backward()
    for a, b in zip(grads_of(tensors), grads_of(alone), strict=True):
        torch.testing.assert_close(a, b)


def test_the_backward_may_be_run_again(inputs):
    tensors = leaves(inputs)
    loss = cct.linear_cross_entropy(*tensors)
    loss.backward(retain_graph=True)
    once = [x.clone() for x in grads_of(tensors)]
    loss.backward()
    for a, b in zip(grads_of(tensors), once, strict=True):
        torch.testing.assert_close(a, 2 * b)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
class TestManyUpstreamGradientsAtOnce:
    """Which PyTorch hands over as one tensor that stands for several."""

    @pytest.mark.parametrize("needed", ["ecb", "e", "cb"])
    def test_is_grads_batched(self, inputs, needed):
        tensors = [x.requires_grad_(name in needed) for name, x in zip("ect", leaves(inputs), strict=False)]
        tensors += [leaves(inputs)[3].requires_grad_("b" in needed)]
        loss, lse = cct.linear_cross_entropy(*tensors, reduction="none", return_lse=True, filter_eps=2.0**-4)
        wanted = [x for x in tensors if x.requires_grad]
        upstream = torch.randn(2, 3, N, device=loss.device)
        batched = torch.autograd.grad((loss, lse), wanted, tuple(upstream), is_grads_batched=True, retain_graph=True)
        only = torch.autograd.grad(loss, wanted, upstream[0], is_grads_batched=True, retain_graph=True)
        for i in range(3):
            one = torch.autograd.grad((loss, lse), wanted, tuple(upstream[:, i]), retain_graph=True)
            without_lse = torch.autograd.grad(loss, wanted, upstream[0, i], retain_graph=True)
            for a, b, c, d in zip(batched, one, only, without_lse, strict=True):
                assert torch.equal(a[i], b)
                assert torch.equal(c[i], d)

    def test_vectorized_jacobian(self, inputs):
        e, c, targets, bias = (x[:9].detach() for x in inputs)

        def per_token(e, c, bias):
            return cct.linear_cross_entropy(e, c, targets % 9, bias, reduction="none", filter_eps=None)

        at_once, one_by_one = (
            torch.autograd.functional.jacobian(per_token, (e, c, bias), vectorize=vectorize) for vectorize in (True, False)
        )
        for a, b in zip(at_once, one_by_one, strict=True):
            assert torch.equal(a, b)


def test_full_backward_hooks_of_the_module(inputs):
    module, seen = cct.LinearCrossEntropy(reduction="sum"), []
    module.register_full_backward_pre_hook(lambda module, d_loss: (2 * d_loss[0],))
    module.register_full_backward_hook(lambda module, grads, d_loss: seen.extend(grads))
    tensors, expected = leaves(inputs), leaves(inputs)
    module(*tensors).backward()
    (2 * cct.linear_cross_entropy(*expected, reduction="sum")).backward()
    for a, b, of_hook in zip(grads_of(tensors), grads_of(expected), [seen[i] for i in (0, 1, 3)], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(of_hook, b)


def test_second_derivatives_are_refused(inputs):
    tensors = leaves(inputs)
    (grad,) = torch.autograd.grad(cct.linear_cross_entropy(*tensors), tensors[0], create_graph=True)
    assert grad.abs().max() > 0
    with pytest.raises(NotImplementedError, match=r"no derivatives \(double backward\); impl='torch_compile'"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(cct.linear_cross_entropy(*tensors, impl="torch_compile"), tensors[0], create_graph=True)
    grad.square().sum().backward()
    assert tensors[0].grad.abs().max() > 0


@pytest.mark.parametrize("place", range(4))
def test_inputs_that_change_before_the_backward_are_noticed(inputs, place):
    tensors = leaves(inputs)
    loss = cct.linear_cross_entropy(*tensors)
    with torch.no_grad():
        tensors[place].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("layout", ["transposed", "every other", "expanded", "reversed batch"])
def test_strides(device, layout):
    torch.manual_seed(0)
    base = {
        "transposed": torch.randn(D, 3, 8).permute(1, 2, 0),
        "every other": torch.randn(3, 16, 2 * D)[:, ::2, ::2],
        "expanded": torch.randn(3, 1, D).expand(3, 8, D),
        "reversed batch": torch.randn(8, 3, D).transpose(0, 1),
    }[layout].to(device)
    c = torch.randn(D, 50, device=device).T
    targets = torch.randint(0, 50, (8, 3), device=device).T
    results = []
    for strided in (True, False):
        e, weight = (x.detach().requires_grad_() if strided else x.detach().contiguous().requires_grad_() for x in (base, c))
        loss = cct.linear_cross_entropy(e, weight, targets if strided else targets.contiguous(), reduction="none", shift=1)
        loss.sum().backward()  # an expanded upstream gradient
        results.append((loss, e.grad, weight.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(inputs, reentrant):
    tensors, plain = leaves(inputs), leaves(inputs)

    def loss_of(e, c, bias):
        return cct.linear_cross_entropy(e * 2, c, inputs[2], bias, shift=1, filter_eps=2.0**-4)

    loss_of(plain[0], plain[1], plain[3]).backward()
    checkpoint(loss_of, tensors[0], tensors[1], tensors[3], use_reentrant=reentrant).backward()
    for a, b in zip(grads_of(tensors), grads_of(plain), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(inputs, dtype, device):
    tensors = leaves(inputs)
    with torch.autocast(device.type, dtype):
        loss, lse = cct.linear_cross_entropy(*tensors, return_lse=True)
    assert loss.dtype == lse.dtype == torch.float32
    loss.backward()
    narrow = leaves(inputs, dtype)
    expected = cct.linear_cross_entropy(*narrow)
    expected.backward()
    assert torch.equal(loss, expected)
    for a, b in zip(grads_of(tensors), grads_of(narrow), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())


def test_autocast_leaves_float64_alone(inputs, device):
    e, c, targets, bias = inputs
    with torch.autocast(device.type, torch.bfloat16):
        assert cct.linear_cross_entropy(e.double(), c.double(), targets, bias.double()).dtype == torch.float64


def test_c_and_bias_are_cast_to_e_s_dtype(inputs):
    e, c, targets, bias = leaves(inputs)
    narrow = e.detach().bfloat16()
    loss = cct.linear_cross_entropy(narrow, c, targets, bias.half())
    expected = cct.linear_cross_entropy(narrow, c.bfloat16(), targets, bias.half().bfloat16())
    assert torch.equal(loss, expected)
    loss.backward()
    assert c.grad.dtype == bias.grad.dtype == torch.float32
    in_float32 = cct.linear_cross_entropy(narrow, c, targets, bias)
    assert torch.equal(in_float32, cce.linear_cross_entropy(narrow, c.detach().bfloat16(), targets, bias=bias.detach()))


def test_tied_weights(inputs):
    """e comes from c itself: both of c's gradients arrive."""
    _, c, targets, _ = leaves(inputs)
    cct.linear_cross_entropy(c[:N], c, targets, filter_eps=None).backward()
    exact = c.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(exact[:N] @ exact.T, targets).backward()
    torch.testing.assert_close(c.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_threads(inputs):
    """Forward and backward in threads of their own, as in a pipeline."""
    expected = leaves(inputs)
    cct.linear_cross_entropy(*expected).backward()
    every = [leaves(inputs) for _ in range(4)]
    threads = [threading.Thread(target=lambda t=t: cct.linear_cross_entropy(*t).backward()) for t in every]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for tensors in every:
        for a, b in zip(grads_of(tensors), grads_of(expected), strict=True):
            assert torch.equal(a, b)


class TestBackwardIntoGrad:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_is_the_backward(self, inputs, dtype):
        tensors, expected = leaves(inputs, dtype), leaves(inputs, dtype)
        loss = cct.linear_cross_entropy_backward(*tensors, d_loss=0.5, filter_eps=2.0**-4)
        expected_loss = cct.linear_cross_entropy(*expected, filter_eps=2.0**-4)
        (0.5 * expected_loss).backward()
        assert torch.equal(loss, expected_loss)
        assert not loss.requires_grad
        for a, b in zip(grads_of(tensors), grads_of(expected), strict=True):
            assert torch.equal(a, b)

    def test_adds_in_place(self, inputs):
        tensors = leaves(inputs)
        cct.linear_cross_entropy_backward(*tensors)
        before = [(x, x.data_ptr(), x.clone()) for x in grads_of(tensors)]
        cct.linear_cross_entropy_backward(*tensors)
        for grad, (same, address, once) in zip(grads_of(tensors), before, strict=True):
            assert grad is same
            assert grad.data_ptr() == address
            torch.testing.assert_close(grad, 2 * once, rtol=1e-5, atol=1e-7)

    def test_goes_on_through_what_is_no_leaf(self, inputs):
        body = torch.eye(D, device=inputs[0].device).requires_grad_()
        _, weight, targets, bias = leaves(inputs)
        cct.linear_cross_entropy_backward(inputs[0] @ body, weight, targets, bias)
        same_body, same = body.detach().clone().requires_grad_(), leaves(inputs)
        cct.linear_cross_entropy(inputs[0] @ same_body, *same[1:]).backward()
        torch.testing.assert_close(body.grad, same_body.grad)
        torch.testing.assert_close(weight.grad, same[1].grad)

    def test_under_autocast_a_parameter_s_gradient_is_not_rounded(self, inputs, device):
        e, c, targets, bias = inputs
        narrow, wide = (c.clone().requires_grad_() for _ in range(2))
        with torch.autocast(device.type, torch.bfloat16):
            cct.linear_cross_entropy_backward(e, wide, targets, bias, filter_eps=None)
            cct.linear_cross_entropy(e, narrow, targets, bias, filter_eps=None).backward()
        assert torch.equal(narrow.grad, narrow.grad.bfloat16().float())
        assert not torch.equal(wide.grad, wide.grad.bfloat16().float())
        torch.testing.assert_close(wide.grad, narrow.grad, rtol=2.0**-8, atol=1e-7)

    def test_frozen(self, inputs):
        loss = cct.linear_cross_entropy_backward(*inputs, label_smoothing=0.1)
        assert torch.equal(loss, cct.linear_cross_entropy(*inputs, label_smoothing=0.1))


def test_a_step_of_training_lowers_the_loss(device):
    torch.manual_seed(0)
    body, head = torch.nn.Linear(8, D).to(device), torch.nn.Linear(D, 50).to(device)
    x, targets = torch.randn(64, 8, device=device), torch.randint(0, 50, (64,), device=device)
    criterion, optimizer = cct.LinearCrossEntropy(), torch.optim.Adam([*body.parameters(), *head.parameters()], lr=0.03)
    losses = []
    for _ in range(30):
        loss = criterion(body(x), head.weight, targets, head.bias)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
