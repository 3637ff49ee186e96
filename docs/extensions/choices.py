"""What the package chooses on each GPU, and what each backend has, asked of the package itself.

`{chosen-backends}` is a table with a row for each kind of GPU, `{extras-of-backends}` one with a row for each extra.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
from docutils import nodes
from docutils.parsers.rst import Directive

from cce_numba import gpu, plan
from cce_numba.ampere.tiles import tiles_for
from cce_numba.arguments import DISTILLATION, EXTRAS, Outline
from cce_numba.backend import BACKENDS, backend_module
from cce_numba.hopper.tiles import HopperTiles
from cce_numba.interchange import BFLOAT16
from cce_numba.options import DEFAULTS, Options

# GPUs with the compute capabilities that they have; those of a line are chosen for alike, or the page would be wrong.
GPUS = {
    ((7, 0), (7, 5)): "V100, T4, RTX 20",
    ((8, 0), (8, 7)): "A100, A30, Orin",
    ((8, 6), (8, 9)): "RTX 30, RTX 40, A10, L4, L40S",
    ((9, 0),): "H100, H200, GH200",
    ((10, 0), (10, 3)): "B200, B300",
    ((12, 0), (12, 1)): "RTX 50, RTX PRO, DGX Spark",
}


def chosen(cc: tuple[int, int], dtype: np.dtype, **options: Any) -> str:
    """The backend of a call with arrays of a dtype on a GPU of a compute capability, whatever is here.

    >>> import numpy as np
    >>> chosen((9, 0), np.dtype(np.float16)), chosen((9, 0), np.dtype(np.float32)), chosen((7, 5), np.dtype(np.float16))
    ('hopper', 'simt', 'simt')
    """
    outline = Outline(8192, 128_000, 2048, dtype, True, "cuda:0", Options.of(dtype, options))
    with (
        mock.patch.object(gpu, "current", return_value=gpu.Gpu(cc, 100)),
        mock.patch.object(gpu, "why_not", return_value=None),
        mock.patch.object(gpu, "SIMULATED", False, create=True),
    ):
        return plan.choose_backend(outline, None)[0]


def chosen_table() -> list[str]:
    """Markdown: a row for each kind of GPU."""
    titles = "compute capability", "GPUs, for example", "float16, bfloat16", "its tiles, stages", "float32, float64"
    rows = [f"| {' | '.join(titles)} |", "|---|---|---|---|---|"]
    for ccs, names in GPUS.items():
        (half,) = {chosen(cc, dtype) for cc in ccs for dtype in (np.dtype(np.float16), BFLOAT16)}
        (wide,) = {chosen(cc, dtype) for cc in ccs for dtype in (np.dtype(np.float32), np.dtype(np.float64))}
        (tiles,) = {_tiles(half, cc) for cc in ccs}
        told = ", ".join(f"{major}.{minor}" for major, minor in ccs)
        rows.append(f"| {told} | {names} | `{half}` | {tiles} | `{wide}` |")
    return rows


def _tiles(backend: str, cc: tuple[int, int]) -> str:
    """Tokens and entries of a tile of the forward on tensor cores, and the stages of its ring."""
    tiles = {"hopper": HopperTiles(), "ampere": tiles_for(cc)}.get(backend)
    return "" if tiles is None else f"{tiles.block_n} x {tiles.block_v}, {tiles.stages}"


def extras_table() -> list[str]:
    """Markdown: a row for each result that not all backends have had from the beginning."""
    rows = [f"| what is asked for | {' | '.join(f'`{name}`' for name in BACKENDS)} |", "|---|" + "---|" * len(BACKENDS)]
    for extra in sorted(EXTRAS):
        has = ("yes" if extra in backend_module(name).EXTRAS else "not yet" for name in BACKENDS)
        name = "`linear_distillation`" if extra == DISTILLATION else f"`{extra}`" if extra in DEFAULTS else extra
        rows.append(f"| {name} | {' | '.join(has)} |")
    return rows


class ChosenBackends(Directive):
    """The first table."""

    def run(self) -> list[nodes.Node]:
        """Asks the package."""
        return _parsed(self, chosen_table())


class ExtrasOfBackends(Directive):
    """The second."""

    def run(self) -> list[nodes.Node]:
        """Asks the backends."""
        return _parsed(self, extras_table())


def _parsed(directive: Directive, lines: list[str]) -> list[nodes.Node]:
    made = nodes.container()
    directive.state.nested_parse(lines, directive.content_offset, made)
    return made.children


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls it."""
    app.add_directive("chosen-backends", ChosenBackends)
    app.add_directive("extras-of-backends", ExtrasOfBackends)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
