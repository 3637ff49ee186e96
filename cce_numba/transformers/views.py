"""A module with one part replaced, for one call, without a write that another thread could see.

A view of a module is an object that shares the module's `__dict__`. So it has the same parameters, submodules, hooks and other
attributes, and what is written to it is written to the module. Its class inherits from the module's class and adds one
property, a child or `forward`, which goes before what the `__dict__` says.

`torch.compile` cannot trace that. What it traces is not executed, so there the part is replaced in the module itself and put
back: the two writes cancel, and the compiled program holds neither.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def path_to(module: torch.nn.Module, target: torch.nn.Module) -> tuple[str, ...] | None:
    """The names from a module to one of its descendants, or None."""
    children = module._modules
    for name, child in children.items():
        if child is target:
            return (name,)
    for name in reversed(list(children)):  # heads come last
        child = children[name]
        below = None if child is None else path_to(child, target)
        if below is not None:
            return (name, *below)
    return None


def with_part(module: Any, path: tuple[str, ...], part: Any, run: Callable[[Any], Any]) -> Any:
    """What `run` returns, of the module with `part` for the descendant at `path`."""
    if not torch.compiler.is_dynamo_compiling():
        return run(_view_along(module, path, part))
    parent = module
    for name in path[:-1]:
        parent = parent._modules[name]
    before = parent._modules[path[-1]]
    parent._modules[path[-1]] = part
    try:
        return run(module)
    finally:
        parent._modules[path[-1]] = before


def with_forward(module: Any, path: tuple[str, ...], forward: Callable[..., Any], run: Callable[[Any], Any]) -> Any:
    """What `run` returns, of the module with `forward` for that of its descendant at `path` (`()` is the module itself)."""
    if not torch.compiler.is_dynamo_compiling():
        return run(_view_with_forward(module, path, forward))
    target = module
    for name in path:
        target = target._modules[name]
    before = vars(target).get("forward")
    vars(target)["forward"] = forward  # `torch.compile` does not follow setattr and delattr here
    try:
        return run(module)
    finally:
        if before is None:
            del vars(target)["forward"]
        else:
            vars(target)["forward"] = before


@torch.compiler.disable
def _view_along(module: Any, path: tuple[str, ...], part: Any) -> Any:
    name, *rest = path
    return _view(module, name, _view_along(module._modules[name], tuple(rest), part) if rest else part)


@torch.compiler.disable
def _view_with_forward(module: Any, path: tuple[str, ...], forward: Callable[..., Any]) -> Any:
    if not path:
        return _view(module, "forward", forward)
    target = module
    for name in path:
        target = target._modules[name]
    return _view_along(module, path, _view(target, "forward", forward))


def _view(module: Any, name: str, part: Any) -> Any:
    a_class: Any = type(module)
    view = object.__new__(_class_of_views(a_class, name))
    object.__setattr__(view, "__dict__", module.__dict__)
    object.__setattr__(view, "_part_of_view", part)
    return view


@functools.cache
def _class_of_views(a_class: Any, name: str) -> Any:
    names = {"__slots__": ("_part_of_view",), name: property(lambda view: view._part_of_view)}  # a slot is not in the __dict__
    return type(a_class.__name__, (a_class,), names | {"__module__": a_class.__module__, "__qualname__": a_class.__qualname__})
