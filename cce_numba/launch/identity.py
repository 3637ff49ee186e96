"""What tells a kernel from all others: the function that makes it, and what that function was told."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

_PACKAGE = __name__.partition(".")[0]
_log = logging.getLogger(__name__)


def identity(factory: Callable[..., Any], *args: Any, **kwargs: Any) -> str | None:
    """A function of this package and its arguments as text, different for different kernels; None if that is not certain.

    It is not certain for a factory outside of this package, since the digest of the package's sources (`cubin_cache`) says
    nothing of it, nor for arguments of kinds that `_spelled` does not know.
    """
    if not _is_ours(factory):
        return None
    bound = inspect.signature(factory).bind(*args, **kwargs)
    bound.apply_defaults()
    try:
        arguments = ", ".join(f"{name}={_spelled(value)}" for name, value in bound.arguments.items())
    except TypeError as reason:
        _log.debug("kernels of %s are not kept: %s", factory.__qualname__, reason)
        return None
    return f"{factory.__module__}.{factory.__qualname__}({arguments})"


def _is_ours(thing: Any) -> bool:
    """Whether the digest of the package's sources says all of a function or class."""
    return str(thing.__module__).partition(".")[0] == _PACKAGE and "<" not in thing.__qualname__


def _spelled(value: Any) -> str:
    """A value as text, different for different values, whatever their kind; TypeError for kinds of which that is not known."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str) or isinstance(value, np.dtype):
        return repr(value)
    if kind is tuple:
        return f"({''.join(f'{_spelled(item)}, ' for item in value)})"
    if dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen and _is_ours(kind):  # type: ignore[attr-defined]
        fields = ", ".join(f"{field.name}={_spelled(getattr(value, field.name))}" for field in dataclasses.fields(kind))
        return f"{kind.__module__}.{kind.__qualname__}({fields})"
    if callable(value) and hasattr(value, "__qualname__") and _is_ours(value):  # a function, with remembered results or not
        return f"{value.__module__}.{value.__qualname__}"
    raise TypeError(
        "what a factory is told must be None, bool, int, float, str, a dtype, a tuple, or a function or frozen dataclass of "
        f"{_PACKAGE}, not {kind}"
    )
