"""The notebooks are made of their sources, are small, and run: without a GPU, and on one."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests.helpers.harness import SimulatorHarness

WHY = "the notebooks extra is not installed: pip install '.[notebooks]'"
nbformat = pytest.importorskip("nbformat", reason=WHY)
for package in ("jupytext", "nbclient", "matplotlib"):
    pytest.importorskip(package, reason=WHY)

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.py"))

pytestmark = pytest.mark.skipif(SimulatorHarness.is_active(), reason="notebooks choose for themselves")
by_name = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


def load_build():
    spec = importlib.util.spec_from_file_location("build_notebooks", NOTEBOOKS / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_build()


def test_there_are_twelve():
    assert [int(source.name[:2]) for source in SOURCES] == list(range(1, 13))
    assert build.sources() == SOURCES


@by_name
def test_the_committed_notebook_is_what_its_source_says(source):
    assert build.differs(source) is None, "python notebooks/build.py makes it"


def test_a_changed_source_is_noticed(tmp_path):
    source, built = tmp_path / "01_a.py", tmp_path / "01_a.ipynb"
    source.write_text("# %% [markdown]\n# # A\n\n# %%\nprint(1)\n")
    assert build.differs(source) == "01_a.ipynb has not been built"
    nbformat.write(build.read(source), built)
    assert build.differs(source) == "01_a.ipynb was not run"
    run = build.read(source)
    run.cells[1].execution_count = 1
    nbformat.write(run, built)
    assert build.differs(source) is None
    source.write_text(source.read_text().replace("print(1)", "print(2)"))
    assert build.differs(source) == "01_a.ipynb: cell 1 is not what 01_a.py says"


@by_name
def test_the_committed_notebook_is_small_and_nothing_went_wrong_in_it(source):
    path = source.with_suffix(".ipynb")
    assert path.stat().st_size < build.MOST_BYTES
    notebook = nbformat.read(path, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert outputs
    for output in outputs:
        assert output.output_type != "error"
        text = str(output)
        assert "Warning" not in text
        assert not re.search(r"/(?:home|root|work|tmp|Users)/", text), "paths of one machine"
        assert not re.search(r"(?:src|href)=.?https?:", text), "pictures bring all that they need"


@by_name
def test_a_lesson_has_all_its_parts(source):
    text = re.sub(r"\n# (?=\w)", " ", source.read_text(encoding="utf-8"))  # paragraphs on one line
    assert re.search(rf"^# # {int(source.name[:2])} · ", text, re.MULTILINE)
    for part in ("In this lesson you will", "## (?:Measure it|Memory)", "## Exercises", "## What to take away"):
        assert re.search(part, text), part
    assert text.count('# %% jupyter={"source_hidden": true}') >= 1  # the exercises' solutions
    assert "assert" in text
    for name in re.findall(r"\]\((\d\d_\w+\.ipynb)\)", text):
        assert (NOTEBOOKS / name).exists(), name


@by_name
def test_it_runs_without_a_gpu(source, monkeypatch):
    monkeypatch.setenv("LESSONS_WITHOUT_GPU", "1")
    monkeypatch.delenv("NUMBA_ENABLE_CUDASIM", raising=False)
    notebook = build.execute(build.read(source))
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert "No GPU here" in str(notebook.cells[1:3])


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@by_name
def test_it_runs_on_a_gpu(source, monkeypatch):
    monkeypatch.delenv("LESSONS_WITHOUT_GPU", raising=False)
    monkeypatch.delenv("NUMBA_ENABLE_CUDASIM", raising=False)
    notebook = build.execute(build.read(source))
    assert "Kernels run on" in str(notebook.cells[1:3])
