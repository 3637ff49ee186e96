"""`linear_distillation` of tensors: gradients by autograd, for the student alone."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import cce_numba.torch as cct  # noqa: E402

KINDS = ("forward_kl", "reverse_kl", "jsd")


def heads(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 5, 3), (11, 3), (11,), (2, 5, 4), (11, 4), (11,)
    tensors = [torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes]
    targets = torch.tensor([[0, 0, -100, 0, 0], [0, -100, 0, 0, 0]])
    return [x.requires_grad_() for x in tensors[:3]], tensors[3:], targets


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(kind, reduction):
    (e, c, bias), (teacher_e, teacher_c, teacher_bias), targets = heads()

    def of(e, c, bias):
        options = {"kind": kind, "temperature": 2.0, "softcap": 4.0, "shift": 1, "targets": targets, "reduction": reduction}
        return cct.linear_distillation(e, c, teacher_e, teacher_c, bias=bias, teacher_bias=teacher_bias, **options)

    assert torch.autograd.gradcheck(of, (e, c, bias))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_against_stored_logits(kind):
    (e, c, bias), (teacher_e, teacher_c, teacher_bias), _ = heads()
    log_q, log_p = (x.log_softmax(-1) for x in (e @ c.T + bias, teacher_e @ teacher_c.T + teacher_bias))
    a, b = (log_p, log_q) if kind == "forward_kl" else (log_q, log_p)
    expected = (a.exp() * (a - b)).sum(-1).mean()
    loss = cct.linear_distillation(e, c, teacher_e, teacher_c, bias=bias, teacher_bias=teacher_bias, kind=kind)
    torch.testing.assert_close(loss, expected)
    for x, y in zip(*(torch.autograd.grad(z, (e, c, bias)) for z in (loss, expected)), strict=True):
        torch.testing.assert_close(x, y)


def test_only_what_requires_grad_and_never_the_teacher():
    (e, c, _), (teacher_e, teacher_c, _), _ = heads()
    teacher_e.requires_grad_()
    cct.linear_distillation(e.detach(), c, teacher_e, teacher_c).backward()
    assert e.grad is None
    assert teacher_e.grad is None
    assert c.grad.abs().max() > 0


def test_a_change_in_place_is_noticed():
    (e, c, _), (teacher_e, teacher_c, _), _ = heads()
    moving = e * 1
    loss = cct.linear_distillation(moving, c, teacher_e, teacher_c)
    with torch.no_grad():
        moving.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
