"""What Napoleon takes for a type and is none: in `Returns:`, all that stands before the first colon of the first line."""

from __future__ import annotations

from typing import Any


def break_before_colon(lines: list[str]) -> list[str]:
    """The lines, with the first line of a `Returns:` section broken before the word that has its first colon.

    >>> break_before_colon(["Returns:", "    The loss, an array: 0-d."])
    ['Returns:', '    The loss, an', '    array: 0-d.']
    """
    made: list[str] = []
    for i, line in enumerate(lines):
        words = line.split(" ")
        first = next((at for at, word in enumerate(words) if ":" in word), None)
        if i and lines[i - 1].strip() == "Returns:" and first is not None and " ".join(words[:first]).strip():
            indent = line[: len(line) - len(line.lstrip())]
            made += [" ".join(words[:first]), indent + " ".join(words[first:])]
        else:
            made.append(line)
    return made


def _process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = break_before_colon(lines)


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls it."""
    app.connect("autodoc-process-docstring", _process, priority=400)  # before Napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
