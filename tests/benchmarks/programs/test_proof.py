"""`table1`, `figure3`, `figure4`, `figure5`, `memory`, `comparison` as wholes, on the CPU with small sizes."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.measure import record
from benchmarks.proof.problems import IGNORED, TABLE1, VOCABULARY, Problem

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("matplotlib", reason="pictures need it")

import torch

from benchmarks.peers import methods
from benchmarks.programs import comparison, figure3, figure5, memory, table1
from benchmarks.proof import problems, studies

EAGER = methods.BY_NAME["PyTorch eager"]


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "commit", lambda: "abc")
    monkeypatch.setattr(record, "gpu", lambda: "")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recorded(tmp_path, name):
    return json.loads((tmp_path / f"{name}_quick_cpu.json").read_text())


class TestTable1:
    @pytest.fixture(autouse=True)
    def small_problems(self, monkeypatch):
        shapes = (
            Problem(TABLE1, "small", (130, 300, 200)),
            Problem(VOCABULARY, "V=100", (130, 100, 200)),
            Problem(IGNORED, "50% ignored", (130, 300, 200), 0.5),
        )
        monkeypatch.setattr(problems, "QUICK", shapes)

    def test_it_validates_times_and_draws(self, tmp_path, capsys):
        assert main(["table1", "--quick", "--methods", "cce_numba", "eager", "F.linear", "cut", "--rounds", "2"]) == 0
        cells = recorded(tmp_path, "table1")["cells"]
        assert len(cells) == 3 * 11
        by_name = {cell["method"]: cell for cell in cells if cell["problem"] == "50% ignored"}
        for name in ("cce_numba", "cce_numba, exact", "PyTorch eager", "F.linear_cross_entropy, chunked"):
            cell = by_name[name]
            if "F.linear" in name and cell["status"] == "failed":
                continue  # this PyTorch has none
            assert cell["status"] == "ok"
            assert cell["loss"] == pytest.approx(cell["exact_loss"], rel=1e-5)
            assert 0 < cell["errors"]["e"] < 1e-4
            assert 0 < cell["errors"]["c"] < 1e-4
            assert len(cell["rounds"]) == 2
            assert all(ms > 0 for each in cell["rounds"] for ms in each.values())
        assert "c" not in by_name["cce_numba, frozen classifier"]["errors"]
        paper = by_name["cut_cross_entropy"]
        assert paper["status"] == "missing"
        assert "GPU" in paper["why"] or "installed" in paper["why"]
        out = capsys.readouterr().out
        assert "by vocabulary" in out
        assert {path.name for path in tmp_path.glob("*.svg")} == {
            f"table1_quick_cpu{section}.svg" for section in ("", "_vocabulary", "_ignored")
        }

    def test_it_goes_on_where_it_stopped(self, tmp_path, monkeypatch):
        argv = ["table1", "--quick", "--methods", "eager", "--only", "small"]
        assert main([*argv, "--rounds", "1"]) == 0
        (before,) = recorded(tmp_path, "table1")["cells"]
        assert main([*argv, "--rounds", "3"]) == 0
        (after,) = recorded(tmp_path, "table1")["cells"]
        assert after["rounds"][:1] == before["rounds"]
        assert len(after["rounds"]) == 3
        monkeypatch.setattr(table1.making, "make", None)  # nothing is left to do
        assert main([*argv, "--rounds", "3"]) == 0

    def test_nothing_is_begun_when_the_time_is_over(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(table1.Session, "is_over", True)
        assert main(["table1", "--quick", "--methods", "eager"]) == 0
        assert not (tmp_path / "table1_quick_cpu.json").exists()
        assert "3 cells are left" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("criterion", "status", "why"),
        [
            (lambda e, c, t: EAGER.make()(1.5 * e, c, t), "wrong", "the loss is"),
            (lambda e, c, t: EAGER.make()(e, c, t).detach() + 0 * (e.sum() + c.sum()), "wrong", "the error of dC is 1"),
            (lambda e, c, t: EAGER.make()(e, c, t) + 0 * (e + 1).log().sum(), "wrong", "not"),
            (lambda e, c, t: EAGER.make()(e, c, t) + e.sum() - e.sum().detach(), "wrong", "an ignored token has a gradient"),
            (lambda e, c, t: 1 / 0, "failed", "ZeroDivisionError"),
        ],
    )
    def test_a_method_that_is_wrong_says_so_and_is_not_timed(self, criterion, status, why, tmp_path, monkeypatch):
        broken = methods.Method("broken", "torch", lambda: criterion, on_cpu=True)
        monkeypatch.setattr(table1, "METHODS", (broken,))
        assert main(["table1", "--quick", "--only", "50%", "--rounds", "1"]) == 0
        (cell,) = recorded(tmp_path, "table1")["cells"]
        assert cell["status"] == status
        assert why in cell["why"]
        assert cell["rounds"] == []


def test_every_method_has_a_name_of_its_own_and_says_why_it_cannot_run():
    assert len(methods.BY_NAME) == len(methods.METHODS)
    for method in methods.METHODS:
        assert (method.why_none("cpu") is None) == method.on_cpu or method.package != "torch"
        assert not method.is_ours or method.why_none("cpu") is None


class TestFigure3:
    def test_probabilities_by_rank(self, tmp_path, archive_arrays, capsys):
        e = archive_arrays["embeddings_bf16"].astype(np.uint32) << 16
        c = (archive_arrays["classifier_q"] * archive_arrays["classifier_scale"][..., None].astype(np.float64)).reshape(60, 8)
        z = e.view(np.float32).astype(np.float64) @ c.T
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        archive_arrays["loss_fp32"] = -np.log(p[np.arange(30), archive_arrays["targets"]]).astype(np.float32)
        np.savez(tmp_path / "layer.npz", **archive_arrays)
        assert main(["figure3", "--quick", "--data", str(tmp_path / "layer.npz")]) == 0
        (cell,) = recorded(tmp_path, "figure3")["cells"]
        assert cell["N"] == 30
        ordered = -np.sort(-p, axis=1)
        np.testing.assert_allclose(cell["mean"], ordered.mean(0)[np.array(cell["rank"]) - 1], rtol=1e-3)
        for each in cell["thresholds"]:
            survives = (p >= 2.0 ** -each["power"]).any(0)
            survives[archive_arrays["targets"]] = True
            assert each["columns"] == pytest.approx(survives.mean(), abs=1e-6)
            assert each["dropped"] == pytest.approx(p[:, ~survives].sum() / 30, abs=1e-6)
        assert "2^-12" in capsys.readouterr().out
        assert (tmp_path / "figure3_quick_cpu.svg").exists()

    def test_losses_that_are_not_the_known_ones_are_wrong(self, archive, capsys):
        assert main(["figure3", "--quick", "--data", archive]) == 1
        assert "from the known ones" in capsys.readouterr().err

    def test_without_data_only_quick_works(self, monkeypatch, capsys):
        monkeypatch.setattr(figure3, "_MADE_UP", (140, 300, 200))
        assert main(["figure3"]) == 2
        assert main(["figure3", "--quick"]) == 0


class TestFigure5:
    @pytest.fixture(autouse=True)
    def small_model(self, monkeypatch, tmp_path):
        monkeypatch.setattr(figure5, "QUICK", dataclasses.replace(figure5.QUICK, steps=6, points=3))
        monkeypatch.setattr(studies, "CHECKPOINTS", tmp_path / "checkpoints")

    def test_a_run_that_stops_goes_on_to_the_same_losses(self, tmp_path, monkeypatch, capsys):
        argv = ["figure5", "--quick", "--methods", "cce_numba", "--vocabularies", "600", "--seeds", "0"]
        assert main(argv) == 0
        whole = recorded(tmp_path, "figure5")["cells"]
        assert [cell["method"] for cell in whole] == ["cce_numba, exact", "cce_numba", "cce_numba, drop"]
        for cell in whole:
            assert cell["validation"][-1][1] < cell["validation"][0][1]
            assert [step for step, _ in cell["train"]] == [2, 4, 6]
        (tmp_path / "figure5_quick_cpu.json").unlink()
        asked = iter([False, True])
        monkeypatch.setattr(studies.Session, "is_over", property(lambda self: next(asked, True)))
        assert main(argv) == 0  # one piece
        assert "stops after step 2" in " ".join(capsys.readouterr().out.split())
        assert len(list((tmp_path / "checkpoints").rglob("*.pt"))) == 1
        monkeypatch.setattr(studies.Session, "is_over", False)
        assert main(argv) == 0
        assert "goes on after step 2" in capsys.readouterr().out
        assert not list((tmp_path / "checkpoints").rglob("*.pt"))
        pieces = recorded(tmp_path, "figure5")["cells"]
        for one, other in zip(whole, pieces, strict=True):
            assert one["train"] == other["train"]
            assert one["validation"] == other["validation"]
        assert "V = 600" in (tmp_path / "figure5_quick_cpu.svg").read_text()

    def test_a_peer_that_fails_is_left_out(self, tmp_path, monkeypatch, capsys):
        def broken(e, c, targets):
            raise RuntimeError("no such preset")

        peer = methods.Method("peer", "torch", lambda: broken, on_cpu=True)
        monkeypatch.setattr(studies, "METHODS", (peer, methods.BY_NAME["cce_numba, exact"]))
        assert main(["figure5", "--quick", "--vocabularies", "600", "--seeds", "0", "1"]) == 0
        assert [cell["method"] for cell in recorded(tmp_path, "figure5")["cells"]] == ["cce_numba, exact"] * 2
        out = " ".join(capsys.readouterr().out.split())
        assert out.count("RuntimeError: no such preset") == 1
        assert "2 cells are left" in out

    def test_wrong_arguments_are_told(self, capsys):
        assert main(["figure5"]) == 2
        assert "--tokens: names the text to learn" in capsys.readouterr().err
        assert main(["figure5", "--quick", "--vocabularies", "100"]) == 2
        assert "must be at least 511" in capsys.readouterr().err


class TestModelsOfTransformers:
    @pytest.fixture(autouse=True)
    def transformers(self):
        pytest.importorskip("transformers", reason="transformers is not installed")

    def test_figure4_learns_from_a_folder(self, tmp_path, monkeypatch, capsys):
        from benchmarks.programs import figure4
        from benchmarks.training import pretrained

        monkeypatch.setattr(figure4, "QUICK", dataclasses.replace(figure4.QUICK, steps=4, points=2))
        made = pretrained.of_size(figure4.QUICK_MODEL, "cpu", torch.float32)
        made.language_model.save_pretrained(tmp_path / "weights")
        argv = ["figure4", "--quick", "--methods", "exact", "--seeds", "0", "1", "--weights", str(tmp_path / "weights")]
        assert main(argv) == 0
        first, second = recorded(tmp_path, "figure4")["cells"]
        assert first["validation"][-1][1] < first["validation"][0][1]
        assert first["train"] != second["train"]  # other batches, from the same weights
        assert main(["figure4", "--quick", "--weights", str(tmp_path / "absent")]) == 2
        assert "is not there" in capsys.readouterr().err

    def test_memory_of_a_step(self, tmp_path, monkeypatch, capsys):
        (model,) = memory.QUICK
        smaller = model.config | {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        monkeypatch.setattr(memory, "QUICK", (dataclasses.replace(model, config=smaller, sequences=1, length=40),))
        assert main(["memory", "--quick", "--methods", "exact", "eager", "cut"]) == 0
        cells = recorded(tmp_path, "memory")["cells"]
        assert {cell["recompute"] for cell in cells} == {False, True}
        for recompute in (False, True):
            of = {cell["method"]: cell for cell in cells if cell["recompute"] == recompute}
            assert of["cut_cross_entropy"]["status"] == "missing"
            ours, eager = of["cce_numba, exact"], of["PyTorch eager"]
            assert ours["state_bytes"] == eager["state_bytes"] > 3 * 4 * 300 * 32
            assert ours["losses"][0] == pytest.approx(np.log(300), rel=0.05)
        assert "the model without a loss" in capsys.readouterr().out


class TestComparison:
    @pytest.fixture(autouse=True)
    def few(self, monkeypatch):
        monkeypatch.setattr(comparison, "QUICK_SIZES", (128,))
        monkeypatch.setattr(comparison, "QUICK_RAGGED", (1, 127))

    def test_all_shapes_are_right(self, tmp_path, capsys):
        assert main(["comparison", "--quick"]) == 0
        cells = recorded(tmp_path, "comparison")["cells"]
        assert len(cells) == 1 + 8
        assert not any(cell["wrong"] for cell in cells)
        out = capsys.readouterr().out
        assert "1 of 1 tiled shapes right" in out
        assert "8 of 8 ragged shapes right" in out

    @pytest.mark.parametrize(("factor", "wrong"), [(0.0, "e 1, c 1"), (1.001, "e 0.001, c 0.001")])
    def test_wrong_gradients_are_found(self, factor, wrong, monkeypatch, capsys):
        right = comparison.cct.linear_cross_entropy

        def broken(*arguments, **options):
            loss = right(*arguments, **options)
            return factor * loss + (1 - factor) * loss.detach()

        monkeypatch.setattr(comparison.cct, "linear_cross_entropy", broken)
        assert main(["comparison", "--quick", "--tiled"]) == 1
        assert wrong in capsys.readouterr().err

    def test_there_are_216_shapes(self, monkeypatch):
        class Both:
            quick = tiled = ragged = False

        shapes = list(comparison.shapes_of(Both))
        assert sum(kind == "tiled" for kind, _ in shapes) == 216
        assert len(set(shapes)) == 432
