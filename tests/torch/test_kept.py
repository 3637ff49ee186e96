"""What autograd keeps of a forward on a device, and what a backward makes of it, on a GPU that only seems to be there."""

from __future__ import annotations

import pytest
import torch

from benchmarks.measure.stand_in import stand_in, stand_in_for_torch
from cce_numba.torch import autograd, call, linear_cross_entropy
from tests.helpers.harness import SimulatorHarness

pytest.importorskip("cupy")
if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)

N, V, D = 300, 5000, 64


@pytest.fixture
def on_a_device():
    e = torch.zeros(N, D, dtype=torch.bfloat16, requires_grad=True)
    c = torch.zeros(V, D, dtype=torch.bfloat16, requires_grad=True)
    with stand_in(), stand_in_for_torch():
        yield e, c, torch.zeros(N, dtype=torch.int64)


def forms(found):
    arrays = {name: getattr(found, name) for name in call.SAVED}
    return {name: x if x is None else (x.data.ptr, x.shape, x.dtype, x.strides) for name, x in arrays.items()}


@pytest.fixture
def statistics(monkeypatch):
    """The forms of a forward's statistics, and of those that its backward has."""
    seen = []
    of, backward = call.Kept.of, call.backward
    monkeypatch.setattr(call.Kept, "of", lambda p, plan, found, wrt: seen.append(forms(found)) or of(p, plan, found, wrt))
    monkeypatch.setattr(
        call, "backward", lambda p, plan, found, *others: seen.append(forms(found)) or backward(p, plan, found, *others)
    )
    return seen


@pytest.mark.parametrize("options", [{}, {"filter": "drop"}, {"filter_eps": None}, {"z_loss": 0.1}], ids=str)
def test_a_backward_has_the_arrays_of_its_forward(on_a_device, statistics, options):
    linear_cross_entropy(*on_a_device, **options).backward()
    before, after = statistics
    assert before == after
    assert (before["survivors"] is None) == ("filter_eps" in options)


def test_blocks_may_come_back_elsewhere(on_a_device, statistics):
    held = []  # else the memory of what was packed is taken again
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x) or x.clone(), lambda x: x.clone()):
        linear_cross_entropy(*on_a_device).backward()
    before, after = statistics
    assert {name: form[1:] for name, form in before.items() if form} == {name: form[1:] for name, form in after.items() if form}
    assert before["survivors"][0] != after["survivors"][0]
    assert after["log_sum"][0] - after["max_logit"][0] == before["log_sum"][0] - before["max_logit"][0] == 4 * N, "in one block"


def test_operators_have_their_own_form(on_a_device, monkeypatch):
    loss = linear_cross_entropy(*on_a_device)
    given = []
    monkeypatch.setattr(autograd, "is_watched", lambda tensors: True)
    monkeypatch.setattr(autograd.operators, "backward", lambda saved, *others: given.append(saved) or {})
    loss.backward()
    (saved,) = given
    sizes = {name: x.numel() for name, x in zip(call.SAVED, saved, strict=True)}
    assert (sizes["lse"], sizes["tokens"], sizes["n_valid"], sizes["mean_logit"]) == (N, N, 1, 0)
    assert sizes["survivors"] == 3 * 27 * 192 // 8, "three blocks of tokens, 27 whole tiles of the vocabulary"


def test_without_a_backward_nothing_is_kept(on_a_device, statistics):
    with torch.no_grad():
        linear_cross_entropy(*on_a_device)
    assert not statistics
