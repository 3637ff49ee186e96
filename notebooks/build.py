"""Makes the notebooks out of their sources, and runs them: `python build.py [NAME ...]`.

Each `NN_name.py` is a notebook in jupytext's percent format; `NN_name.ipynb` beside it is what it gives, with outputs. Edit the
source, build, commit both. `--check` runs nothing: it says which notebooks are not made of their sources as these are now.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent
MOST_BYTES = 400 * 1024  # of a notebook with its outputs
# Small products gain nothing by more threads, and those of several notebooks at a time keep each other waiting.
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")


def sources() -> list[Path]:
    """The notebooks' sources, in order."""
    return sorted(NOTEBOOKS.glob("[0-9][0-9]_*.py"))


def read(source: Path) -> nbformat.NotebookNode:
    """A source as a notebook without outputs; the same source gives the same notebook."""
    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    notebook.metadata = nbformat.NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"}, language_info={"name": "python"}
    )
    return notebook


def execute(notebook: nbformat.NotebookNode, timeout_s: int = 600) -> nbformat.NotebookNode:
    """Runs all cells, in this folder; raises nbclient's CellExecutionError for the first that fails."""
    client = NotebookClient(
        notebook, timeout=timeout_s, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOKS)}}
    )
    client.execute(env={**ONE_THREAD, **os.environ})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def differs(source: Path) -> str | None:
    """How the committed notebook differs from what the source says, or None if it does not."""
    path = source.with_suffix(".ipynb")
    if not path.exists():
        return f"{path.name} has not been built"
    built, wanted = nbformat.read(path, as_version=4), read(source)
    theirs, ours = ([(cell.cell_type, cell.source) for cell in notebook.cells] for notebook in (built, wanted))
    for number, (their, our) in enumerate(zip(theirs, ours, strict=False)):
        if their != our:
            return f"{path.name}: cell {number} is not what {source.name} says"
    if len(theirs) != len(ours):
        return f"{path.name} has {len(theirs)} cells, {source.name} {len(ours)}"
    if any(cell.cell_type == "code" and cell.source and cell.execution_count is None for cell in built.cells):
        return f"{path.name} was not run"
    return None


def main() -> int:
    """Builds, or checks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="beginnings of notebooks' names; all by default")
    parser.add_argument("--check", action="store_true", help="only say what is not in step")
    arguments = parser.parse_args()
    failed = 0
    for source in sources():
        if arguments.names and not source.name.startswith(tuple(arguments.names)):
            continue
        if arguments.check:
            if reason := differs(source):
                failed += 1
                print(reason)
            continue
        begin = time.monotonic()
        text = nbformat.writes(execute(read(source)))
        size = len(text.encode())
        source.with_suffix(".ipynb").write_text(text + "\n", encoding="utf-8")
        print(f"{source.stem}: {time.monotonic() - begin:.0f} s, {size / 1024:.0f} KiB", flush=True)
        if size > MOST_BYTES:
            failed += 1
            print(f"  more than {MOST_BYTES // 1024} KiB: smaller pictures, fewer steps")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
