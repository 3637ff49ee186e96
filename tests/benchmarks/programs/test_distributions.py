"""`distributions`: what it measures, and that it times nothing that is wrong."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import cce_numba as cce
from benchmarks.__main__ import main
from benchmarks.measure import device, timing
from benchmarks.programs import distributions


def test_refuses_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(device, "why_none", lambda: "there is none")
    assert main(["distributions"]) == 3
    assert capsys.readouterr().err == "benchmarks distributions: error: there is none\n"


@pytest.mark.usefixtures("without_gpu")
def test_it_validates_times_shows_and_records(tmp_path, capsys):
    assert main(["distributions", "--small", "--rounds", "2", "--record", "name"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for part in ("300 x 1000 x 200, calibrated", "and entropy, top 8", "exact, with entropy"):
        assert part in out
    written = json.loads((tmp_path / "name.json").read_text())
    assert [found["data"] for found in written["data"]] == ["calibrated", "random"]
    for found in written["data"]:
        assert set(found["forward"]["calls"]) == {"cublas", "loss", *distributions.FORWARDS}
        for part in distributions.PARTS:
            for call in found[part]["calls"].values():
                assert call["x"]["p10"] <= call["x"]["median"] <= call["x"]["p90"]
        assert 0 < found["forward"]["errors"]["entropy"] < 2e-5
        assert 0 < found["gradients"]["errors"]["exact"] < 4e-3
        assert 0 < found["gradients"]["errors"]["default"] < 0.1
        assert set(found["gradients"]["slower"]) == {"default", "exact"}
        assert all(0 < error < 4e-3 for error in found["distillation"]["errors"].values())
        assert len(found["distillation"]["calls"]) == 2 + 2 * len(distributions.DIVERGENCES)


def off(name, factor):
    def change(function):
        def changed(*arrays, **options):
            result = function(*arrays, **options)
            if (value := getattr(result, name)) is None:
                return result
            replace = dataclasses.replace if dataclasses.is_dataclass(result) else type(result)._replace
            return replace(result, **{name: value * factor})

        return changed

    return change


def of_divergence(of_loss, of_gradient):
    def change(function):
        def changed(*arrays, **options):
            loss, grads = function(*arrays, **options)
            return loss * of_loss, dataclasses.replace(grads, e=grads.e * of_gradient)

        return changed

    return change


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize(
    ("part", "function", "change", "told"),
    [
        ("forward", "linear_logprobs", off("entropy", 1.001), "and entropy: entropy is off by"),
        ("forward", "linear_logprobs", off("logprobs", 1.001), "log-probabilities: logprobs is off by"),
        ("forward", "linear_logprobs", off("top_ids", 0), "top 8: the 8 entries are not the best"),
        ("gradients", "backward", off("e", 1.2), "default: the error of dE"),
        (
            "distillation",
            "linear_distillation_with_grad",
            of_divergence(1.001, 1),
            "forward_kl: a token's divergence is off by",
        ),
        ("distillation", "linear_distillation_with_grad", of_divergence(1, 1.2), "forward_kl: the error of dE"),
    ],
    ids=["entropy", "logprobs", "best", "gradient", "divergence", "gradient of divergence"],
)
def test_what_is_wrong_is_not_timed(part, function, change, told, monkeypatch, capsys):
    monkeypatch.setattr(distributions.cce, function, change(getattr(cce, function)))
    monkeypatch.setattr(timing, "interleaved", lambda *_: pytest.fail("timed"))
    assert main(["distributions", "--small", "--parts", part]) == 1
    assert told in capsys.readouterr().err


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize(("factor", "is_timed"), [(1, True), (0, False)])
def test_a_peer_is_timed_if_it_is_right(factor, is_timed, monkeypatch, tmp_path):
    """Its dE is compared with float64, as ours is."""

    def call_of(inputs):
        return lambda: distributions.with_entropy(inputs, {"filter_eps": None}).e * np.float32(factor)

    monkeypatch.setattr(distributions, "of_liger", call_of)
    assert main(["distributions", "--small", "--rounds", "2", "--parts", "gradients", "--record", "name"]) == 0
    for found in json.loads((tmp_path / "name.json").read_text())["data"]:
        assert (distributions.LIGER in found["gradients"]["calls"]) == is_timed
        assert (found["gradients"]["errors"][distributions.LIGER] < 0.1) == is_timed
