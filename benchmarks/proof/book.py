"""A record that grows: each cell is written as soon as it is there, and a later run goes on where one has stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.measure import record
from cce_numba.commands import UsageError

Key = dict[str, Any]


class Book:
    """A JSON file with `surroundings`, `how` and `cells`.

    A cell is a dictionary that holds its key, what it was `made_with`, and what was found. `same` says whether `find` passes
    over cells that another commit or another GPU made. They stay in the file until they are made anew.
    """

    def __init__(self, path: Path, how: dict[str, Any], *, same: bool = True) -> None:
        """Reads the file if it is there. Raises UsageError if it is no such record, or was taken otherwise than `how` says."""
        self.path, self.same, self.how = path, same, json.loads(json.dumps(how))
        self.cells: list[dict[str, Any]] = []
        # A record that git knows makes the checkout dirty by growing, which must not make its own cells old.
        self.made_with = {"gpu": record.gpu(), "commit": record.commit().removesuffix("-dirty")}
        if path.exists():
            self.cells = self._read()["cells"]

    def find(self, key: Key) -> dict[str, Any] | None:
        """The cell with this key, None if there is none or it is passed over."""
        cell = self._cell(key)
        return cell if cell is not None and (not self.same or cell["made_with"] == self.made_with) else None

    def put(self, key: Key, found: dict[str, Any]) -> dict[str, Any]:
        """Writes a cell, in the place of the one with this key if there is one; returns it."""
        made = key | {"made_with": self.made_with} | found
        old = self._cell(key)
        if old is None:
            self.cells.append(made)
        else:
            self.cells[self.cells.index(old)] = made
        self.write()
        return made

    def results(self) -> dict[str, Any]:
        """What the file holds."""
        return {"surroundings": record.surroundings(), "how": self.how, "cells": self.cells}

    def write(self) -> None:
        """Writes the file whole, so that it is never found half written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(f".{os.getpid()}.new")
        new.write_text(json.dumps(self.results(), indent=1) + "\n")
        new.replace(self.path)

    def _cell(self, key: Key) -> dict[str, Any] | None:
        return next((cell for cell in self.cells if all(cell.get(name) == value for name, value in key.items())), None)

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text())
            other, _ = found["how"], found["cells"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"--record: {self.path} is no record of this command: {error!r}") from error
        for name in self.how:
            if other.get(name) != self.how[name]:
                told = f"{self.path} was taken with {name} {other.get(name)}, not {self.how[name]}"
                raise UsageError(f"--record: {told}; name another record, or remove this one")
        return found
