"""`training_step` as a whole, with PyTorch on the CPU, where a graph is the step itself."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.tables.autograd import COMPILED_LOSS, OURS, STORED

pytest.importorskip("torch", reason="PyTorch is not installed")

from benchmarks.programs import training_step
from benchmarks.training import trainer
from benchmarks.training.transformer import Size


@pytest.fixture(autouse=True)
def small(torch_on_cpu, monkeypatch):
    monkeypatch.setattr(trainer, "captured", lambda step: (step, 2**20))
    monkeypatch.setattr(trainer, "LEARNING_STEPS", 5)
    monkeypatch.setattr(training_step, "STEPS", 4)
    monkeypatch.setattr(training_step, "SMALL_SIZE", Size(2, 32, 1000, hidden=64, layers=1, heads=2))


def test_it_validates_times_shows_and_records(tmp_path, capsys):
    assert main(["training_step", "--small", "--rounds", "2", "--record", "name"]) == 0
    out = capsys.readouterr().out
    assert "head untied" in out
    assert "CUDA graph" in out
    assert "wrong" not in out
    step = json.loads((tmp_path / "name.json").read_text())["step"]
    assert step["last_loss"] < step["first_loss"]
    assert [row["loss"] for row in step["rows"]] == [OURS, STORED, COMPILED_LOSS, *[OURS, STORED] * 2]
    for row in step["rows"]:
        assert 0 <= row["apart"] <= step["apart_at_most"]
        assert row["tokens_per_s"] == pytest.approx(64e3 / row["median_ms"], rel=0.01)
        assert row["runs"] == 2


def test_steps_are_timed_where_nothing_changes(monkeypatch, capsys):
    seen = []

    class Trainer(trainer.Trainer):
        def step(self, loss):
            value = super().step(loss)
            seen.append(self.model.head.detach().float().numpy())
            return value

    monkeypatch.setattr(training_step, "Trainer", Trainer)
    assert main(["training_step", "--small", "--tied", "--rounds", "2"]) == 0
    assert "head tied" in capsys.readouterr().out
    learning, timed = seen[: trainer.LEARNING_STEPS], seen[-2 * 7 :]
    assert not np.array_equal(learning[-1], learning[-2])
    assert all(np.array_equal(one, learning[-1]) for one in timed)


@pytest.mark.parametrize("factor", [0.5, float("nan")])
def test_a_wrong_loss_is_told_and_not_timed(factor, monkeypatch, tmp_path, capsys):
    right = training_step.cct.linear_cross_entropy

    def wrong(e, c, targets):  # the loss is right, or NaN; its gradients are not
        loss = right(e * factor, c, targets)
        return loss + (right(e, c, targets) - loss).detach()

    monkeypatch.setattr(training_step.cct, "linear_cross_entropy", wrong)
    assert main(["training_step", "--small", "--rounds", "1", "--record", "name"]) == 1
    told = capsys.readouterr()
    assert told.err.endswith("not timed: eager, cce_numba; compiled, cce_numba; CUDA graph, cce_numba\n")
    assert "from those of stored logits" in told.out
    for row in json.loads((tmp_path / "name.json").read_text())["step"]["rows"]:
        assert ("median_ms" in row) == (row["loss"] != OURS)


def test_a_way_that_fails_leaves_the_others(monkeypatch, capsys):
    def captured(step):
        raise RuntimeError("no graphs [here]")

    monkeypatch.setattr(trainer, "captured", captured)
    assert main(["training_step", "--small", "--rounds", "1"]) == 1
    told = capsys.readouterr()
    assert told.err.endswith("not timed: CUDA graph, cce_numba; CUDA graph, stored logits\n")
    assert "wrong: RuntimeError: no graphs [here]" in told.out
