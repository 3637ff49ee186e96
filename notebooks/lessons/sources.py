"""Kernels out of the notebooks' sources, without running the notebooks: for tests, and for what is recorded on a GPU."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).parents[1]


def definitions(number: int) -> dict[str, Any]:
    """What a lesson defines: imports, functions and classes, constants, instructions, other names for what is imported."""
    (path,) = NOTEBOOKS.glob(f"{number:02d}_*.py")
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {alias.asname or alias.name for node in imports for alias in node.names}
    kept = [node for node in tree.body if _defines(node, imported)]
    scope: dict[str, Any] = {"__name__": path.stem}
    exec(compile(ast.Module(kept, []), str(path), "exec"), scope)
    return scope


def _defines(node: ast.stmt, imported: set[str]) -> bool:
    if isinstance(node, ast.FunctionDef):  # a property of hypothesis would want what the lesson has drawn
        return all(ast.unparse(decorator).startswith("cuda.jit") for decorator in node.decorator_list)
    if isinstance(node, ast.Import | ast.ImportFrom | ast.ClassDef):
        return True
    if not isinstance(node, ast.Assign) or not all(isinstance(target, ast.Name) for target in node.targets):
        return False
    value = node.value
    if isinstance(value, ast.Attribute):
        return isinstance(value.value, ast.Name) and value.value.id in imported
    is_instruction = isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "instruction"
    return is_instruction or isinstance(value, ast.Constant)
