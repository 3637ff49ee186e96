"""How the shared tests call a backend: its arrays, its tile edges, its results as NumPy."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any, ClassVar

import numpy as np
import pytest
from numba import config

import cce_numba as cce
from cce_numba import logprobs
from cce_numba.backend import backend_module
from cce_numba.survivors import unpack_survivors
from tests.helpers.cases import DTYPES, Case, Edges


def why_no_gpu() -> str | None:
    """Why tests cannot run on a GPU here, or None if they can."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    import cupy

    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no NVIDIA GPU with a working driver (CUDA says {str(error).partition(':')[0]})"
    return None


class Harness:
    """A backend under test; NumPy arrays in and out."""

    backend: str
    edges: Edges

    def device(self, array: np.ndarray) -> Any:
        """The array where the backend wants it."""
        return array

    def host(self, array: Any) -> Any:
        """A result as NumPy; None stays None."""
        return array

    def _options(self, case: Case) -> dict[str, Any]:
        options = {"backend": self.backend, **case.options}
        return {name: self.device(value) if isinstance(value, np.ndarray) else value for name, value in options.items()}

    def _arrays(self, case: Case) -> tuple[Any, Any, Any]:
        return self.device(case.e), self.device(case.c), self.device(case.targets)

    def forward(self, case: Case) -> cce.Result:
        """The backend's own result, on its device."""
        self.skip_unless_it_takes(case.e.dtype)
        return cce.forward(*self._arrays(case), **self._options(case))

    def skip_unless_it_takes(self, dtype: np.dtype) -> None:
        """Skips a test of what this backend leaves to others, and says so."""
        if dtype not in self.edges.dtypes:
            pytest.skip(f"backend {self.backend} takes {', '.join(map(str, self.edges.dtypes))}; this is about {dtype}")

    def skip_unless_it_has(self, *extras: str) -> None:
        """Skips a test of an extra that this backend does not have yet; another test makes sure that it says so."""
        if missing := set(extras) - backend_module(self.backend).EXTRAS:
            pytest.skip(f"backend {self.backend} does not have {', '.join(sorted(missing))} yet")

    def backward(self, result: cce.Result, d_loss: Any = None, d_lse: Any = None, **named: Any) -> cce.Gradients:
        """Gradients as NumPy. named: other arguments of `cce.backward`, arrays among them."""
        named = {name: self.device(x) if isinstance(x, np.ndarray) and x.ndim else x for name, x in named.items()}
        upstream = [self.device(x) if isinstance(x, np.ndarray) and x.ndim else x for x in (d_loss, d_lse)]
        grads = cce.backward(result, *upstream, **named)
        return cce.Gradients(*(self.host(getattr(grads, f.name)) for f in dataclasses.fields(grads)))

    def numbers(self, result: cce.Result) -> dict[str, np.ndarray]:
        """loss, nll, lse, target_logit, n_valid as NumPy."""
        return {name: self.host(getattr(result, name)) for name in ("loss", "nll", "lse", "target_logit", "n_valid")}

    def call(self, function: str, case: Case, *, targets: bool = True, **named: Any) -> Any:
        """Another public function, its result as NumPy."""
        arrays = self._arrays(case) if targets else self._arrays(case)[:2]
        options = self._options(case)
        if function != "linear_cross_entropy":  # the building blocks filter nothing
            options.pop("filter", None)
        return self.host(getattr(cce, function)(*arrays, **options, **named))

    def logprobs(self, case: Case, **options: Any) -> dict[str, Any]:
        """`linear_logprobs` of the case's targets, as NumPy by name; None for what was not asked for."""
        self.skip_unless_it_takes(case.e.dtype)
        given = {name: x for name, x in self._options(case).items() if name in logprobs.OPTIONS}
        found = cce.linear_logprobs(*self._arrays(case), **given, **options)
        return {name: self.host(x) for name, x in found._asdict().items()}

    def kept(self, result: cce.Result, V: int) -> np.ndarray | None:
        """(n_valid, V) bool: what the filter keeps of G; None if nothing was recorded."""
        statistics = result._statistics
        if statistics.survivors is None:
            return None
        rows = np.repeat(unpack_survivors(statistics, V), statistics.survivor_block, axis=0)
        return rows[: int(self.host(result.n_valid))]


class CpuHarness(Harness):
    backend = "cpu"
    # Survivor blocks of 128 tokens; bytes of 8 survivor bits. The blocks of the BLAS are tested by making them small.
    edges: ClassVar = Edges(n=(1, 128, 256), v=(1, 8, 64), d=(1, 8), max_n=300, max_v=150, max_d=40, long_v=9001)


class SimulatorHarness(Harness):
    backend = "simt"
    edges: ClassVar = Edges(n=(1, 4, 8), v=(1, 8, 16, 32), d=(1, 4, 8), max_n=9, max_v=40, max_d=9, long_v=203)

    @staticmethod
    def is_active() -> bool:
        """Whether this process runs kernels in Numba's simulator."""
        return bool(config.ENABLE_CUDASIM)


class GpuHarness(Harness):
    edges: ClassVar = Edges(
        n=(1, 64, 128, 256), v=(1, 8, 64, 128, 1024), d=(1, 8, 16), max_n=400, max_v=1500, max_d=300, long_v=20_003
    )

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def device(self, array: np.ndarray) -> Any:
        import cupy

        return cupy.asarray(array)

    def host(self, array: Any) -> Any:
        return array.get() if hasattr(array, "get") else array


class HopperHarness(GpuHarness):
    # Tiles of 128 x 192 x 64; groups of 256 tokens, phases of the vocabulary, whole rounds of 11 groups.
    edges: ClassVar = Edges(
        n=(1, 64, 128, 256, 512),
        v=(1, 8, 192, 384, 768, 192 * 16),
        d=(1, 8, 64, 128, 320, 384),
        max_n=700,
        max_v=4000,
        max_d=450,
        long_v=40_003,
        dtypes=DTYPES[:2],
    )

    def __init__(self) -> None:
        super().__init__("hopper")

    def kept_coarsely(self, result: cce.Result, V: int) -> np.ndarray | None:
        """(n_valid, V) bool: what dC is made for, in tiles; None if that is what the filter keeps."""
        statistics = result._statistics
        if statistics.survivors is None or result.plan.coarse_eps is None:
            return None
        blocks = -(-len(result._problem.e) // statistics.survivor_block)
        assert len(statistics.survivors) == 2 * blocks
        coarse = dataclasses.replace(statistics, survivors=statistics.survivors[blocks:])
        return self.kept(dataclasses.replace(result, _statistics=coarse), V)

    @staticmethod
    def why_not() -> str | None:
        """Why the GPU here cannot run it, or None."""
        from cce_numba import gpu

        major, minor = gpu.current().compute_capability
        return None if major == 9 else f"the GPU has compute capability {major}.{minor}, and this is about 9.x (Hopper)"


class AmpereHarness(HopperHarness):
    # Tiles of 128 x 256 x 64 (128 x 128 where shared memory is small); jobs of 192 columns; phases of the vocabulary.
    edges: ClassVar = Edges(
        n=(1, 64, 128, 256, 512),
        v=(1, 8, 128, 192, 256, 512, 256 * 16),
        d=(1, 8, 64, 128, 192, 320, 384),
        max_n=700,
        max_v=5000,
        max_d=450,
        long_v=40_003,
        dtypes=DTYPES[:2],
    )

    def __init__(self) -> None:
        GpuHarness.__init__(self, "ampere")

    @staticmethod
    def why_not() -> str | None:
        """Why the GPU here cannot run it, or None."""
        from cce_numba import gpu

        major, minor = gpu.current().compute_capability
        return None if major >= 8 else f"the GPU has compute capability {major}.{minor}, and this is about 8.0 and later"


class AmpereFloat32Harness(AmpereHarness):
    # Tiles of 128 x 128 x 32; jobs of 192 columns. Float32 comes to tensor cores only if the backend is asked for by name.
    edges: ClassVar = Edges(
        n=(1, 32, 128, 256),
        v=(1, 8, 128, 192, 256, 128 * 16),
        d=(1, 4, 8, 32, 64, 192, 256),
        max_n=500,
        max_v=3000,
        max_d=300,
        long_v=40_003,
        dtypes=DTYPES[2:3],
    )


class Poisoned:
    """`numpy` or `cupy`, but for `empty`."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def empty(self, shape: Any, dtype: Any) -> Any:
        array = self._module.empty(shape, dtype)
        array.reshape(-1).view(np.uint8)[...] = 0xFF  # NaN in every floating-point format, -1 or the largest integer
        return array
