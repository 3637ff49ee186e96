"""Who may import whom: the folders mean what they say."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "cce_numba").rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_for_types_alone(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports_of(path: Path, *, when_loaded: bool = False) -> set[str]:
    """The modules of this package that a file imports; `when_loaded`: only those imported as soon as the file is."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if is_for_types_alone(child) or (when_loaded and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                found.update(f"{child.module}.{alias.name}" for alias in child.names)
                found.add(str(child.module))
            visit(child)

    visit(ast.parse(path.read_text()))
    return {name for name in found if name in MODULES}


MODULES = {module_of(path) for path in FILES}
PACKAGES = {module_of(path): path for path in FILES}


def within(package: str) -> list[Path]:
    return [path for name, path in PACKAGES.items() if name == package or name.startswith(package + ".")]


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        # What tensor cores of all generations share needs no instruction of one of them, and knows none of their kernels.
        (
            "cce_numba.tensor_core",
            ["cce_numba.ptx.tma", "cce_numba.ptx.wgmma", "cce_numba.ptx.mbarrier", "cce_numba.ptx.cluster"],
        ),
        ("cce_numba.tensor_core", ["cce_numba.ampere", "cce_numba.hopper", "cce_numba.simt", "cce_numba.cpu"]),
        # Nor do kernels for all GPUs since 8.0.
        (
            "cce_numba.ampere",
            ["cce_numba.ptx.tma", "cce_numba.ptx.wgmma", "cce_numba.ptx.mbarrier", "cce_numba.ptx.cluster"],
        ),
        # Backends lend each other nothing.
        ("cce_numba.ampere", ["cce_numba.hopper", "cce_numba.simt", "cce_numba.cpu"]),
        ("cce_numba.hopper", ["cce_numba.ampere", "cce_numba.simt", "cce_numba.cpu"]),
        ("cce_numba.simt", ["cce_numba.hopper", "cce_numba.cpu", "cce_numba.tensor_core", "cce_numba.ptx"]),
        ("cce_numba.cpu", ["cce_numba.hopper", "cce_numba.simt", "cce_numba.tensor_core", "cce_numba.ptx", "cce_numba.launch"]),
        # Instructions and launches know nothing of what they are for.
        (
            "cce_numba.ptx",
            sorted(name for name in MODULES if name.startswith("cce_numba.") and not name.startswith("cce_numba.ptx")),
        ),
        (
            "cce_numba.launch",
            [f"cce_numba.{name}" for name in ("hopper", "simt", "cpu", "tensor_core", "ptx", "commands")],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_packages_keep_to_themselves(package, forbidden):
    files = within(package)
    assert files, f"{package} is there"
    for path in files:
        for name in imports_of(path):
            assert not any(name == other or name.startswith(other + ".") for other in forbidden), f"{path} imports {name}"


def test_no_module_imports_itself_through_others():
    loaded = {module_of(path): imports_of(path, when_loaded=True) for path in FILES}
    done: set[str] = set()

    def walk(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above[above.index(module) :], module)) if module in above else ""
        if module in done:
            return
        for other in loaded[module] - {module}:
            # A package that a submodule is imported from has been loaded before it, or is being loaded.
            if not module.startswith(other + "."):
                walk(other, (*above, module))
        done.add(module)

    for module in sorted(loaded):
        walk(module, ())


@pytest.mark.parametrize("package", ["launch", "simt", "cpu", "commands"])
def test_no_cycle_within_a_package(package):
    """Not even by what functions import when they are called."""
    inside = {name for name in MODULES if name.startswith(f"cce_numba.{package}.")}
    assert len(inside) > 4
    graph = {name: (imports_of(PACKAGES[name]) & inside) - {name} for name in inside}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_the_reference_is_its_own():
    for path in (ROOT / "reference").glob("*.py"):
        assert not re.search(r"^\s*(import|from) cce_numba", path.read_text(), re.MULTILINE), path


def test_the_judge_of_imports_sees_them(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("import cce_numba.gpu\ndef f():\n    from cce_numba.ptx import memory\n")
    assert imports_of(file) == {"cce_numba.gpu", "cce_numba.ptx", "cce_numba.ptx.memory"}
    assert imports_of(file, when_loaded=True) == {"cce_numba.gpu"}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_what_is_imported_from_the_package_is_there(path):
    """Type checkers take a module that is missing for one that they cannot see."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "cce_numba":
            assert node.module in MODULES, f"{path} imports from {node.module}"
