"""What the functions for JAX's arrays check before `arguments.py` sees shapes and dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from cce_numba import interchange
from cce_numba.backend import BACKENDS


def checked_arrays(given: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The arrays as JAX's, by name. NumPy's are welcome, as they are everywhere in JAX.

    Raises TypeError for anything else, and ValueError for an array that several devices share.
    """
    arrays = {name: _checked_array(name, array) for name, array in given.items()}
    for name, array in arrays.items():
        _check_one_device(name, array)
    return arrays


def _checked_array(name: str, array: Any) -> jax.Array:
    if not isinstance(array, jax.Array | np.ndarray | np.generic):
        kind = type(array)
        ways = {"torch": "; cce_numba.torch has the functions for tensors", "cupy": "; cce_numba itself takes CuPy's arrays"}
        way = ways.get(interchange.library_of(array), f"; pass jax.numpy.asarray({name})")
        raise TypeError(f"{name}: must be a jax.Array, got {kind.__module__}.{kind.__qualname__}{way}")
    return jax.numpy.asarray(array)


def _check_one_device(name: str, array: jax.Array) -> None:
    """Raises ValueError if the array lies on several devices, or may: under `jax.jit` JAX may tell the mesh alone."""
    mesh = jax.typeof(array).sharding.mesh
    axes = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    shared = {axis: mesh.shape[axis] for axis, kind in axes.items() if kind != jax.sharding.AxisType.Manual}
    devices = 1 if isinstance(array, jax.core.Tracer) else len(array.sharding.device_set)
    if devices > 1 or any(size > 1 for size in shared.values()):
        where = f"the axes {shared} of a mesh" if shared else f"{devices} devices"
        raise ValueError(
            f"{name}: must be on one device, got an array on {where}: XLA would copy all of it to each of them. Call the loss "
            "inside jax.shard_map, where every device has its own tokens and all of c, with reduction='sum', and add up the "
            "sums with jax.lax.psum; docs/jax.md shows how"
        )


def check_backend(backend: Any) -> None:
    """Raises ValueError unless it is None or one of `BACKENDS`; whether it can run is seen when the program does."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: must be one of {', '.join(map(repr, BACKENDS))} or None, got {backend!r}")
