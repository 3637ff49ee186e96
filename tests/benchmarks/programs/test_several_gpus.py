"""`several_gpus` as a whole, with processes on the CPU; and what is predicted for more."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import scaling_model
from benchmarks.__main__ import main
from benchmarks.measure import record
from benchmarks.scaling_model import Layout, Links, Rates, predicted, volumes

ROOT = Path(__file__).parents[3]
torch = pytest.importorskip("torch", reason="PyTorch is not installed")


def test_runs_and_records(tmp_path, monkeypatch, capfd):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this PyTorch has no gloo")
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert not main(["several_gpus", "--gpus", "2", "--small", "--cpu", "--record", "two"])
    found = json.loads((tmp_path / "two.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["forward", "exact", "default", "default, tokens in shards", "exact"]
    for row in found["rows"]:
        assert row["efficiency"] > 0
        assert row["errors"]["loss"] <= 1e-5
    assert [each["name"] for each in found["collectives"]] == ["all_gather", "all_reduce", "reduce_scatter"]
    assert scaling_model.links_of(found).is_measured
    assert "efficiency" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cpu"], "--cpu: needs --small"),
        (["--gpus", "1", "--small", "--cpu"], "--gpus: must be at least 2"),
        (["--gpus", "4000"], "needs 4000 GPUs, and there are"),
    ],
)
def test_says_what_it_lacks(arguments, said, capsys):
    assert main(["several_gpus", *arguments]) in (2, 3)
    assert said in capsys.readouterr().err


def test_volumes_of_one_rank_alone_are_nothing():
    alone = volumes((8192, 256_000, 2304), Layout(1, 1, 1), True)
    assert (alone.bounds, alone.gather, alone.sum_e, alone.gather_e, alone.sum_c) == (0, 0, 0, 0, 0)


def test_shards_of_tokens_halve_the_sum_of_e_and_gather_it():
    whole, parts = (volumes((64, 100, 10), Layout(4, 2, 1), in_shards) for in_shards in (False, True))
    assert parts.sum_e == whole.sum_e / 2
    assert parts.gather_e == 64 * 10 * 2 * 3 / 4
    assert parts.sum_c == whole.sum_c == 100 * 10 * 2 / 4


def test_with_links_that_take_no_time_ranks_share_the_work():
    one, links = Rates(14.0, 60.0, 20.0), Links(within=1e30, between=1e30, start_s=0.0)
    found = predicted(one, (8192, 256_000, 2304), Layout(4, 2, 1), links)
    assert list(found.efficiency(one, 4)) == pytest.approx([1, 1, 1])


def test_the_page_has_the_table_of_the_model():
    page = (ROOT / "docs" / "several_gpus.md").read_text()
    (shown,) = re.findall(rf"<!-- {scaling_model.PLACE} -->\n\n(.*?)\n\n", page, re.DOTALL)
    assert shown == scaling_model.table(Links()), "print it with `python -m benchmarks.scaling_model`"
