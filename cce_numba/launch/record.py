"""Records: what belongs together travels to a kernel under one name, declared once with each field's type, shape and unit.

A record is a named tuple, so host code builds it by name and kernels read `record.field`. Numba flattens named tuples, and
named tuples in them, to plain parameters: a record costs no instruction and no register.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from numba.cuda import types


class _Declaration(type):
    """Turns the class body of a record into a named tuple."""

    def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> Any:
        if not bases:
            return super().__new__(cls, name, bases, body)
        declared = {field: kind for field, kind in body.items() if not field.startswith("__")}
        tuple_class: Any = NamedTuple(name, [(field, Any) for field in declared])  # type: ignore[misc]
        tuple_class.__doc__, tuple_class.__module__, tuple_class.__qualname__ = (
            body.get("__doc__"),
            body["__module__"],
            body["__qualname__"],
        )
        setattr(tuple_class, "declared", declared)  # noqa: B010 - a type checker knows of no such attribute
        return tuple_class


class Record(metaclass=_Declaration):
    """Base of all records. Its subclasses are named tuples; numba types, or other records, declare their fields.

    What declares a field may also be an object that knows more of it, and has its numba type as attribute `kind`.

    >>> from numba.cuda import types
    >>> class Matrix(Record):
    ...     address = types.uint64  # of (rows, columns) 16-bit numbers
    ...     pitch_bytes = types.int64  # from one row to the next
    >>> Matrix(address=4096, pitch_bytes=128).pitch_bytes
    128
    >>> kind_of(Matrix)
    Matrix(uint64, int64)
    """

    declared: dict[str, Any]

    # For type checkers: subclasses have a named tuple's own.
    def __init__(self, *values: Any, **fields: Any) -> None: ...
    def _replace(self, **fields: Any) -> Any: ...


def kind_of(declared: Any) -> Any:
    """The numba type of what was declared: a type itself; of a record, the named tuple of its fields' types; else its `kind`.

    It names a kernel's parameters in a signature: `types.void(kind_of(Matrix), types.int32)`.
    """
    if isinstance(declared, types.Type):
        return declared
    if isinstance(declared, type):
        kinds = tuple(kind_of(field) for field in cast(Any, declared).declared.values())
        # As numba types a record that a kernel builds: fields of one type make another kind of tuple.
        return types.BaseTuple.from_types(kinds, declared) if kinds else types.NamedTuple((), declared)
    return declared.kind


def flattened(values: Any) -> list[Any]:
    """The numbers in records and tuples, in order: as a kernel takes them.

    >>> flattened([1, (2, (3,), ()), 4])
    [1, 2, 3, 4]
    """
    numbers: list[Any] = []
    for value in values:
        if isinstance(value, tuple):
            numbers += flattened(value)
        else:
            numbers.append(value)
    return numbers
