"""Which module imports which: no cycles where there need be none, and backends that know nothing of each other."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it: also inside functions, and for type checkers alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {module for name in found if name.startswith("cce_numba") and (module := existing(name))}


def existing(name: str) -> str | None:
    """The module that a name is of, or is in."""
    place = ROOT.joinpath(*name.split("."))
    if place.with_suffix(".py").exists():
        return name
    if (place / "__init__.py").exists():
        return name
    return existing(name.rpartition(".")[0]) if "." in name else None


def graph() -> dict[str, set[str]]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): imports_of(path)
        for path in (ROOT / "cce_numba").rglob("*.py")
    }


@pytest.mark.parametrize("package", ["launch", "simt", "cpu", "commands"])
def test_no_cycle_within_a_package(package):
    inside = {name: imported for name, imported in graph().items() if name.startswith(f"cce_numba.{package}")}
    assert len(inside) > 5
    within = {name: {other for other in imported if other in inside and other != name} for name, imported in inside.items()}
    list(graphlib.TopologicalSorter(within).static_order())


@pytest.mark.parametrize(
    ("package", "others"),
    [
        ("simt", ("hopper", "tensor_core", "ptx", "cpu")),
        ("cpu", ("hopper", "tensor_core", "ptx", "simt", "launch")),
        ("hopper", ("simt", "cpu")),
        ("tensor_core", ("simt", "cpu")),
        ("launch", ("simt", "cpu", "hopper", "tensor_core", "ptx", "commands")),
    ],
)
def test_backends_lend_each_other_nothing(package, others):
    for name, imported in graph().items():
        if name.startswith(f"cce_numba.{package}"):
            strangers = {other for other in imported if other.startswith(tuple(f"cce_numba.{one}" for one in others))}
            assert not strangers, name


def test_the_judge_sees_imports():
    found = graph()
    assert "cce_numba.simt.forward" in found["cce_numba.simt.backend"]
    assert "cce_numba.backend" in found["cce_numba.plan"]
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())
