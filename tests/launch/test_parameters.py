"""No function of the kernels takes more than a reader can hold in mind: what belongs together is a record."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import cce_numba

MOST = 12
ROOT = Path(cce_numba.__file__).parent
# What holds to it: files, and packages with all that is in them.
PLACES = ("ampere", "cpu", "hopper", "launch", "ptx", "simt", "tensor_core")


def functions_of(source: str) -> dict[str, list[str]]:
    """`{name and line: parameters}` of all functions in a source, however deep, lambdas among them."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            given = node.args
            several = [given.vararg, given.kwarg]
            parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs, *(x for x in several if x is not None)]
            found[f"{getattr(node, 'name', 'lambda')}, line {node.lineno}"] = [parameter.arg for parameter in parameters]
    return found


def sources_of(place: str) -> list[Path]:
    path = ROOT / place
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


@pytest.mark.parametrize("place", PLACES)
def test_no_function_has_too_many_parameters(place):
    sources = sources_of(place)
    assert sources
    for source in sources:
        for name, parameters in functions_of(source.read_text()).items():
            assert len(parameters) <= MOST, f"{source.relative_to(ROOT)}: {name} has {len(parameters)}: {', '.join(parameters)}"


def test_kernels_and_device_functions_are_among_those():
    """Functions in functions, decorated or not: the scan would be worth nothing if it passed them by."""
    names = {
        name.partition(",")[0] for place in PLACES for source in sources_of(place) for name in functions_of(source.read_text())
    }
    assert {"backward_kernel", "schedule", "store", "list_kernel", "list_tokens", "address_of_row", "segment"} <= names


def test_parameters_of_every_kind_are_counted():
    source = """
def outer(a, /, b, *c, d, **e):
    @decorated
    def inner(f=1): pass
    return lambda g, h: 0
"""
    assert functions_of(source) == {
        "outer, line 2": ["a", "b", "d", "c", "e"],
        "inner, line 4": ["f"],
        "lambda, line 5": ["g", "h"],
    }
