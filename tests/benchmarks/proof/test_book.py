"""Records that grow: what they keep, what they pass over, what they refuse."""

from __future__ import annotations

import json

import pytest

from benchmarks.measure import record
from benchmarks.proof.book import Book
from benchmarks.proof.problems import PROBLEMS, QUICK
from benchmarks.proof.session import Session, chosen, machine
from cce_numba.commands import UsageError


@pytest.fixture(autouse=True)
def one_commit(monkeypatch):
    monkeypatch.setattr(record, "commit", lambda: "abc")
    monkeypatch.setattr(record, "gpu", lambda: "")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "name.json"


def test_each_cell_is_in_the_file_as_soon_as_it_is_put(path):
    book = Book(path, {"size": (1, 2)})
    book.put({"method": "a"}, {"ms": 1.5})
    book.put({"method": "b"}, {"ms": 2.5})
    found = json.loads(path.read_text())
    assert [cell["ms"] for cell in found["cells"]] == [1.5, 2.5]
    assert found["surroundings"].keys() >= {"date", "commit", "gpu", "versions"}
    assert list(path.parent.iterdir()) == [path]  # nothing half written stays


def test_a_later_book_goes_on_and_replaces_in_place(path):
    Book(path, {"size": (1, 2)}).put({"method": "a"}, {"ms": 1.5})
    later = Book(path, {"size": (1, 2)})
    assert later.find({"method": "a"})["ms"] == 1.5
    assert later.find({"method": "b"}) is None
    later.put({"method": "b"}, {"ms": 3})
    later.put({"method": "a"}, {"ms": 4})
    assert [(cell["method"], cell["ms"]) for cell in Book(path, {"size": (1, 2)}).cells] == [("a", 4), ("b", 3)]


def test_cells_of_another_commit_are_made_anew_unless_they_may_stay(path, monkeypatch):
    Book(path, {}).put({"method": "a"}, {"ms": 1.5})
    monkeypatch.setattr(record, "commit", lambda: "def")
    assert Book(path, {}).find({"method": "a"}) is None
    assert Book(path, {}, same=False).find({"method": "a"})["ms"] == 1.5
    assert len(Book(path, {}).cells) == 1  # it is still in the file


def test_a_record_taken_otherwise_is_refused(path):
    Book(path, {"steps": 5}).put({"method": "a"}, {})
    with pytest.raises(UsageError, match="was taken with steps 5, not 6"):
        Book(path, {"steps": 6})
    path.write_text("[]")
    with pytest.raises(UsageError, match="is no record of this command"):
        Book(path, {})


def test_a_session_is_over_when_its_time_is(monkeypatch, tmp_path):
    session = Session("table1", quick=False, console=None, limit_s=10.0, start=100.0)
    now = [109.9]
    monkeypatch.setattr("benchmarks.proof.session.time.perf_counter", lambda: now[0])
    assert not session.is_over
    now[0] = 110.0
    assert session.is_over
    session.limit_s = None
    assert not session.is_over


def test_where_records_and_pictures_lie(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "gpu", lambda: "NVIDIA H100 80GB HBM3, 580.1\nNVIDIA H100 80GB HBM3, 580.1")
    assert machine() == "h100"
    session = Session("table1", quick=False, console=None)
    assert session.path() == record.RESULTS / "table1_h100.json"
    assert session.image("models").parts[-3:] == ("docs", "images", "table1_models")
    session.quick = True
    assert session.image("models") == record.RESULTS / "table1_quick_h100_models"
    session.out = tmp_path
    assert session.path() == tmp_path / "table1_quick_h100.json"


def test_words_choose_names():
    assert chosen(["Ab", "bc", "cd"], ["B"], "--only") == ["Ab", "bc"]
    with pytest.raises(UsageError, match="--only: there is no 'x' among Ab; bc; cd"):
        chosen(["Ab", "bc", "cd"], ["b", "x"], "--only")


@pytest.mark.parametrize("problems", [PROBLEMS, QUICK])
def test_problems_are_told_apart(problems):
    keys = [tuple(problem.key.items()) for problem in problems]
    assert len(set(keys)) == len(keys)
    assert all(problem.shape[2] > 192 for problem in problems)  # calibrated inputs need it
