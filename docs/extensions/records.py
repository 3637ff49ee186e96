"""Tables out of recorded results, so that no figure is copied by hand.

    ```{record} forward
    ```

`benchmarks/tables/readme.py` lists the tables, and makes them out of `benchmarks/results/*.json`.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive

from benchmarks.measure import record
from benchmarks.tables.readme import TABLES


class Recorded(Directive):
    """A table, and the file that it is made of with GPU, date and commit."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Reads the record and parses the table as Markdown."""
        if self.arguments[0] not in TABLES:
            raise self.error(f"there is no table {self.arguments[0]!r}; there are {', '.join(TABLES)}")
        table, name = TABLES[self.arguments[0]]
        self.state.document.settings.env.note_dependency(str(record.path(name)))
        results = record.read(name)
        where = results["surroundings"]
        lines = [*table(results).split("\n"), "", _source(name, where)]
        made = nodes.container(classes=["recorded"])
        self.state.nested_parse(lines, self.content_offset, made)
        return [made]


def _source(name: str, where: dict[str, Any]) -> str:
    on = where.get("gpu") or f"{where.get('cores')} cores, {where.get('cpu')}"
    return f"*`benchmarks/results/{name}.json`: {on}, {where['date']}, commit {where['commit']}.*"


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls it."""
    app.add_directive("record", Recorded)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
