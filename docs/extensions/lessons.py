"""The notebooks as pages, and single pictures of theirs on other pages.

Notebooks lie beside the lessons' sources, outside of the site's folder. Before pages are read they are copied to
`docs/notebooks/` (which git ignores), with the README as the lessons' page. A picture is taken from a notebook's output by its
title:

    ```{lesson-picture} 07_softmax_is_sparse
    :title: Probabilities by rank: mean, median and the middle eight tenths, over 4096 tokens
    ```
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, ClassVar

import nbformat
from docutils import nodes
from docutils.parsers.rst import Directive, directives

DOCS = Path(__file__).parents[1]
SOURCE, COPIES, PICTURES = DOCS.parent / "notebooks", DOCS / "notebooks", DOCS / "pictures"


def copy_notebooks() -> None:
    """Copies the notebooks that changed, and the README as `index.md` with a table of contents."""
    COPIES.mkdir(exist_ok=True)
    found = sorted(SOURCE.glob("[0-9][0-9]_*.ipynb"))
    for gone in {path.name for path in COPIES.glob("*.ipynb")} - {path.name for path in found}:
        (COPIES / gone).unlink()
    for notebook in found:
        _write(COPIES / notebook.name, _folded(notebook))
    names = "\n".join(path.stem for path in found)
    text = (SOURCE / "README.md").read_text(encoding="utf-8")
    _write(COPIES / "index.md", f"{text}\n```{{toctree}}\n:hidden:\n\n{names}\n```\n")


def _folded(notebook: Path) -> str:
    """The notebook, with the tag that MyST-NB has for sources that Jupyter folds away: those of solutions and of figures."""
    read = nbformat.read(notebook, as_version=4)
    for cell in read.cells:
        if cell.metadata.get("jupyter", {}).get("source_hidden"):
            cell.metadata.setdefault("tags", []).append("hide-input")
    return nbformat.writes(read)


def _write(path: Path, text: str) -> None:
    """Writes what is new, and leaves other files as old as they are: Sphinx reads again what is younger."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def pictures(notebook: Path) -> dict[str, str]:
    """The SVG pictures of a notebook's outputs, by their titles."""
    cells = nbformat.read(notebook, as_version=4).cells
    outputs = (output for cell in cells for output in cell.get("outputs", ()))
    found = (output.get("data", {}).get("image/svg+xml") for output in outputs)
    return {title: svg for svg in found if svg is not None for title in (_title(svg),) if title}


def _title(svg: str) -> str | None:
    match = re.search(r"<title>(.*?)</title>", svg, re.DOTALL)
    return match and match[1]


class LessonPicture(Directive):
    """A picture out of a notebook, with its title as the alternative text and an optional caption."""

    required_arguments = 1
    has_content = True
    option_spec: ClassVar = {"title": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        """Writes the picture to a file of its own, and shows it."""
        notebook = SOURCE / f"{self.arguments[0]}.ipynb"
        environment = self.state.document.settings.env
        environment.note_dependency(str(notebook))
        of_title = pictures(notebook)
        title = self.options["title"]
        if title not in of_title:
            raise self.error(f"{notebook.name} has no picture {title!r}; it has {', '.join(map(repr, of_title))}")
        PICTURES.mkdir(exist_ok=True)
        path = PICTURES / f"{notebook.stem}_{hashlib.sha256(title.encode()).hexdigest()[:8]}.svg"
        _write(path, of_title[title])
        figure = nodes.figure("", nodes.image(uri=f"/{path.relative_to(DOCS).as_posix()}", alt=title), classes=["lesson"])
        caption = nodes.caption()
        self.state.nested_parse(self.content, self.content_offset, caption)
        if caption.children:
            figure += nodes.caption("", "", *(child for paragraph in caption.children for child in paragraph.children))
        return [figure]


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls it."""
    copy_notebooks()  # now: Sphinx looks for pages before the next event that would do
    app.add_directive("lesson-picture", LessonPicture)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
