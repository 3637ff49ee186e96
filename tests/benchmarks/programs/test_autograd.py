"""`autograd` as a whole, with PyTorch on the CPU."""

from __future__ import annotations

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.measure import device
from benchmarks.tables.autograd import COMPILED_LOSS, DIRECT, OURS, STORED

pytest.importorskip("torch", reason="PyTorch is not installed")

from benchmarks.programs import autograd


@pytest.fixture(autouse=True)
def small(torch_on_cpu, monkeypatch):
    monkeypatch.setattr(autograd, "SMALL_SHAPES", ((128, 1000, 200),))


def test_refuses_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(device, "torch_with_cuda", lambda: None)
    assert main(["autograd"]) == 3
    assert "this PyTorch finds no GPU" in capsys.readouterr().err
    monkeypatch.setattr(device, "why_none", lambda: "there is none")
    assert main(["autograd"]) == 3
    assert "there is none" in capsys.readouterr().err


def test_what_autograd_may_add():
    def allowed(direct):
        found = autograd.compared({DIRECT: [direct] * 3, OURS: [direct + 0.05] * 3})
        assert found["more_ms"]["median"] == 0.05
        return found["more_ms_at_most"]

    assert (allowed(1.0), allowed(20.0)) == (0.1, 0.6)


def test_it_validates_times_shows_and_records(tmp_path, capsys):
    assert main(["autograd", "--small", "--rounds", "2", "--record", "name"]) == 0
    out = capsys.readouterr().out
    assert "128 x 1000 x 200, cpu" in out
    assert "extra MiB" in out
    assert "wrong" not in out
    (call,) = json.loads((tmp_path / "name.json").read_text())["calls"]
    assert list(call["losses"]) == [OURS, STORED, COMPILED_LOSS]
    assert call["losses"][OURS]["errors"] == {"loss": 0, "e": 0, "c": 0}
    assert call["losses"][OURS]["extra_bytes"] == 2**20 - 2 * 200 * (128 + 1000)
    assert call["device"][DIRECT]["runs"] == 2


@pytest.mark.parametrize("factor", [0.5, float("nan")])
def test_a_wrong_loss_is_told_and_not_timed(factor, monkeypatch, tmp_path, capsys):
    right = autograd.cct.linear_cross_entropy

    def wrong(e, c, targets):  # the loss is right, or NaN; its gradients are not
        loss = right(e * factor, c, targets)
        return loss + (right(e, c, targets) - loss).detach()

    monkeypatch.setattr(autograd.cct, "linear_cross_entropy", wrong)
    assert main(["autograd", "--small", "--rounds", "1", "--record", "name"]) == 1
    told = capsys.readouterr()
    assert "wrong: cce_numba: " in told.out
    assert told.err.endswith("not timed: 128 x 1000 x 200\n")
    assert "device" not in json.loads((tmp_path / "name.json").read_text())["calls"][0]
