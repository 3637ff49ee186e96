"""`learning` as a whole, on the CPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.measure import record

pytest.importorskip("torch", reason="PyTorch is not installed")

import torch

from benchmarks.programs import learning
from benchmarks.training import learner


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(learning, "SMALL_COURSE", replace(learning.SMALL_COURSE, steps=4, length=32))
    monkeypatch.setattr(learning, "SMALL_VOCABULARIES", (600, 1100))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are so small that threads only wait for each other
    yield
    torch.set_num_threads(threads)


def recorded(tmp_path):
    return json.loads((tmp_path / "name.json").read_text())


def keys(results):
    return [(run["vocabulary"], run["way"], run["seed"]) for run in results["runs"]]


def test_it_learns_shows_records_and_draws(tmp_path, capsys):
    ways = ("exact", "drop:2^-9", "unbiased:16/V")
    argv = ["learning", "--small", "--ways", *ways, "--seeds", "0", "1", "--record", "name"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert out.count("learning drawn from a chain of 512 symbols") == 2
    assert out.count("unbiased:16/V") == 4 + 2
    results = recorded(tmp_path)
    assert results["how"]["steps"] == 4
    assert results["how"]["dtype"] == "float32"
    assert keys(results) == [(V, way, seed) for V in (600, 1100) for seed in (0, 1) for way in ways]
    for run in results["runs"]:
        assert run["validation"][-1][1] < run["validation"][0][1]
        assert run["eps"] == {"exact": None, "drop:2^-9": 2**-9, "unbiased:16/V": 16 / run["vocabulary"]}[run["way"]]
        assert run.keys() >= {"train", "columns", "seconds", "gpu", "commit"}
    if importlib.util.find_spec("matplotlib"):
        assert main(["picture", "learning", "--results", "name", "--out", str(tmp_path / "curves")]) == 0
        assert "V = 1,100" in (tmp_path / "curves.svg").read_text()


def test_a_record_is_added_to_and_what_it_has_is_not_repeated(tmp_path, monkeypatch, capsys):
    base = ["learning", "--small", "--vocabularies", "600", "--record", "name"]
    assert main([*base, "--ways", "exact", "--add"]) == 0  # to a record that is not there yet
    first = recorded(tmp_path)["runs"]
    assert main([*base, "--ways", "exact", "drop:2^-9", "--seeds", "0", "1", "--add"]) == 0
    results = recorded(tmp_path)
    assert keys(results) == [(600, "exact", 0), (600, "drop:2^-9", 0), (600, "exact", 1), (600, "drop:2^-9", 1)]
    assert results["runs"][:1] == first
    assert "in spreads of exact" in capsys.readouterr().out
    monkeypatch.setattr(learner, "run", None)  # nothing is left to do
    assert main([*base, "--ways", "drop:2^-9", "--add"]) == 0
    assert recorded(tmp_path)["runs"] == results["runs"]
    assert main([*base, "--steps", "5", "--add"]) == 2
    assert "was taken with steps 4, not 5" in capsys.readouterr().err
    assert recorded(tmp_path)["runs"] == results["runs"]


def test_what_ended_is_recorded_even_if_another_run_breaks(tmp_path, monkeypatch):
    right = learner.run

    def run(course, corpus, way, vocabulary, seed):
        if seed == 1:
            raise RuntimeError("broken")
        return right(course, corpus, way, vocabulary, seed)

    monkeypatch.setattr(learner, "run", run)
    with pytest.raises(RuntimeError, match="broken"):
        main(["learning", "--small", "--ways", "exact", "--vocabularies", "600", "--seeds", "0", "1", "--record", "name"])
    assert keys(recorded(tmp_path)) == [(600, "exact", 0)]


def test_a_file_of_ids_is_learned(tmp_path, capsys):
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(90, size=2000).astype(np.uint16))
    size = ["--steps", "2", "--sequences", "1", "--length", "32", "--hidden", "64", "--layers", "1", "--seeds", "0"]
    argv = ["learning", "--tokens", str(tmp_path / "ids.npy"), *size, "--ways", "unbiased", "--vocabularies", "100", "1000"]
    assert main(argv) == 0
    assert "learning ids.npy, V=1000: 2 steps of 1 x 32 tokens, 1 x 64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tokens", "absent.npy"], "--tokens: absent.npy: "),
        (["--tokens", "shape.npy"], "--tokens: shape.npy: must hold a 1-d array of uint16"),
        (["--tokens", "short.npy"], "must hold at least 5141 token ids, got 5140"),
        (["--tokens", "absent.npy", "--small"], "--small draws a text of its own"),
        (["--small", "--vocabularies", "600", "100"], "for drawn from a chain of 512 symbols, got 100"),
        (["--small", "--ways", "exact", "keep"], "--ways: 'keep' is none of exact"),
        (["--small", "--hidden", "100"], "--hidden: must be a multiple of 64, got 100"),
        (["--small", "--add"], "--add: needs --record NAME"),
    ],
)
def test_wrong_arguments_are_told(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("shape.npy", np.zeros((5, 1000), np.uint16))
    np.save("short.npy", np.zeros(5140, np.uint16))
    assert main(["learning", *argv]) == 2
    assert message in capsys.readouterr().err


def test_the_papers_kernels_are_left_out_with_a_reason(capsys):
    assert main(["learning", "--small", "--vocabularies", "600", "--ways", "exact", "paper"]) == 0
    assert "paper is left out: its kernels need a GPU" in capsys.readouterr().out


def test_the_papers_kernels_take_their_place_where_there_are_any(tmp_path, monkeypatch):
    package, seen = ModuleType("cut_cross_entropy"), []

    def loss(e, c, targets, impl):
        assert impl == "cce"
        seen.append((e.dtype, c.dtype))
        return torch.nn.functional.cross_entropy((e @ c.T).flatten(0, -2), targets.flatten())

    package.linear_cross_entropy = loss
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", package)
    monkeypatch.setattr(learning.paper, "why_none", lambda device: None)
    assert main(["learning", "--small", "--vocabularies", "600", "--ways", "exact", "paper", "--record", "name"]) == 0
    assert len(seen) == 4
    exact, paper = recorded(tmp_path)["runs"]
    assert paper["columns"][0] == [0, {}]
    assert paper["validation"][-1][1] == pytest.approx(exact["validation"][-1][1], abs=1e-3)


def test_why_there_are_none_of_the_papers_kernels(monkeypatch):
    assert learning.paper.why_none("cpu") == "its kernels need a GPU"
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)
    assert learning.paper.why_none("cuda").startswith("cannot be imported: ")
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", ModuleType("cut_cross_entropy"))
    assert learning.paper.why_none("cuda") is None
