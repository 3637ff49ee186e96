"""One run: the same start and batches in every way, drawn anew at each step; shares of columns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")

import torch

import cce_numba.torch as cct
from benchmarks.data import text as texts
from benchmarks.training import columns, learner
from benchmarks.training.learner import Corpus, Course, Learner
from benchmarks.training.transformer import Transformer
from benchmarks.training.ways import way

COURSE = Course(steps=6, sequences=2, length=32, hidden=64, layers=1)
V = 300


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are so small that threads only wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def corpus():
    return Corpus(texts.drawn(4000, 100).spread(V), COURSE, "cpu")


def ran(corpus, name, seed=0):
    return learner.run(COURSE, corpus, way(name, V, torch.float32), V, seed)


def test_a_run_tells_its_curves(corpus):
    found = ran(corpus, "exact")
    assert len(found["train"]) == COURSE.steps
    assert [step for step, _ in found["validation"]] == [1, 2, 3, 4, 5, 6]
    assert found["validation"][-1][1] < found["validation"][0][1] < np.log(V) + 0.1
    assert found["columns"] == [(step, {"kept": 1.0, "flagged": 1.0}) for step in (0, 2, 5)]
    assert 0 < found["seconds"] < 60


def test_points_of_a_curve_are_means_over_its_steps(corpus, monkeypatch):
    every = ran(corpus, "exact")["train"]
    monkeypatch.setattr(learner, "_POINTS", 2)
    found = ran(corpus, "exact")
    assert found["train"] == pytest.approx([np.mean(every[:3]), np.mean(every[3:])], abs=2e-5)
    assert [step for step, _ in found["validation"]] == [3, 6]


def test_all_ways_start_alike_and_take_the_same_batches(corpus):
    exact, again, other = ran(corpus, "exact"), ran(corpus, "exact"), ran(corpus, "exact", seed=1)
    assert exact["validation"] == again["validation"] != other["validation"]
    dropped, unbiased = ran(corpus, "drop:2^-3"), ran(corpus, "unbiased:2^-3")
    assert exact["train"][0] == dropped["train"][0] == unbiased["train"][0] != other["train"][0]
    assert len({each["train"][-1] for each in (exact, dropped, unbiased)}) == 3
    assert all(0 < shares["kept"] < 0.9 for _, shares in dropped["columns"] + unbiased["columns"])


def test_validation_never_sees_what_is_learned_and_is_exact(corpus):
    np.testing.assert_array_equal(corpus.training.numpy(), texts.drawn(4000, 100).spread(V)[:3800])
    assert corpus.validation.shape == (8, 2, 33)
    end = texts.drawn(4000, 100).spread(V)[3800:]
    np.testing.assert_array_equal(corpus.validation[0, 0], end[:33])
    np.testing.assert_array_equal(corpus.validation[-1, -1], end[-33:])
    made = Learner(COURSE.size(V), COURSE, way("drop:2^-3", V, torch.float32), 0, "cpu")
    e, c, targets = made.operands(corpus.validation.flatten(0, 1))
    expected = torch.nn.functional.cross_entropy((e @ c.T).flatten(0, -2), targets.flatten())
    torch.testing.assert_close(made.validated(corpus.validation), expected.detach())


def test_each_step_draws_anew(corpus, monkeypatch):
    seen = []

    def criterion(e, c, targets, filter_seed, **options):
        seen.append((int(filter_seed), options))
        return cct.linear_cross_entropy(e, c, targets)

    made = Learner(COURSE.size(V), COURSE, way("exact", V, torch.float32), 0, "cpu")
    monkeypatch.setattr(learner.cct, "linear_cross_entropy", criterion)
    made = Learner(COURSE.size(V), COURSE, way("unbiased:2^-5", V, torch.float32), 0, "cpu")
    monkeypatch.undo()
    for _ in range(3):
        made.step(corpus.validation[0])
    options = {"filter": "unbiased", "filter_eps": 2.0**-5}
    assert seen == [(step, options) for step in range(3)]


def test_the_rate_rises_and_falls():
    course = replace(COURSE, steps=1000)
    rates = [course.rate(step) for step in range(1001)]
    assert rates[0] == 0.01
    assert rates[99] == rates[100] == max(rates) == 1
    assert all(np.diff(rates[:99]) > 0)
    assert all(np.diff(rates[100:]) < 0)
    assert rates[1000] == pytest.approx(0.1)
    assert replace(course, steps=1).rate(0) == 1


@pytest.mark.parametrize("name", ["drop:2^-6", "unbiased:2^-6"])
def test_shares_of_columns_are_those_of_the_rule(name):
    generator = torch.Generator().manual_seed(0)
    e, c = torch.randn(200, 16, generator=generator), torch.randn(V, 16, generator=generator)
    targets = torch.randint(V, (200,), generator=generator)
    found = columns.shares(e, c, targets, way(name, V, torch.float32), 0)
    eps, kept = 2.0**-6, []
    for rows in (slice(0, 128), slice(128, 200)):
        largest = (e[rows] @ c.T).softmax(-1).amax(0).numpy()
        chance = np.minimum(1, largest / eps) if name.startswith("unbiased") else largest >= eps
        kept.append(np.where(np.isin(np.arange(V), targets[rows]), 1, chance).mean())
    assert found["kept"] == pytest.approx(np.mean(kept), rel=1e-5)
    assert found["kept"] < 1
    assert found["flagged"] >= found["kept"] - 0.05  # of one draw, which differs from the mean


def test_positions_tell_the_same_tokens_apart():
    torch.manual_seed(0)
    size, tokens = COURSE.size(V), torch.full((1, COURSE.length), 7)
    without, with_them = Transformer(size, tied=False), Transformer(size, tied=False, positions=True)
    torch.testing.assert_close(without(tokens)[0, 0], without(tokens)[0, -1])
    assert (with_them(tokens)[0, 0] - with_them(tokens)[0, -1]).abs().max() > 0.1
