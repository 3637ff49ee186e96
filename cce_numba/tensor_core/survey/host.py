"""The survey's launches, in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cce_numba.tensor_core.records import SurvivorBits
from cce_numba.tensor_core.survey.listing import make_list_kernel
from cce_numba.tensor_core.survey.order import make_order_kernel
from cce_numba.tensor_core.survey.rounds import make_phases_kernel, make_rounds_kernel, make_slots_kernel
from cce_numba.tensor_core.survey.sort import make_sort_kernel
from cce_numba.tensor_core.survey.tables import SurveyLayout
from cce_numba.tensor_core.survey.weigh import make_weigh_kernel


@dataclass(frozen=True)
class Products:
    """How many jobs the products of G will take.

    Attributes:
        d_tiles_c: for the rows of dC of a tile of columns, 0 if neither dC nor the gradient of the bias is wanted.
        d_tiles_e: for the rows of dE of a block of tokens, 0 if dE is not wanted.
        zero_fill: whether empty tiles take jobs, too, which write zeros to their rows of dC.
        e_gate: address of (1,) int32: dE takes jobs only if this is not 0. Or 0: it does.
    """

    d_tiles_c: int
    d_tiles_e: int
    zero_fill: bool
    e_gate: int = 0


def survey(
    layout: SurveyLayout,
    base: int,
    *,
    tokens: Any,
    survivors: Any,
    dense_share: float,
    products: Products,
    smoothed: bool = False,
    dense: int = 0,
    fixed_tiles: int = 0,
) -> None:
    """Fills the tables of `layout.at(base)`.

    Args:
        layout: of the problem.
        base: address of layout.nbytes bytes, a multiple of 256.
        tokens: `WeightedTokens`, whose `largest_weight` may be the address of `softmax_weight`.
        survivors: `SurvivorBits`, whose bits of columns past the last are 0; None if all columns survive.
        dense_share: if more than this share of all pairs survives, all columns are taken to survive.
        products: how many jobs the products of G will take.
        smoothed: there are weights beside those of the softmax and of the target, so a token may have weight though both are 0.
        fixed_tiles: as in `make_rounds_kernel`.
        dense: address of (1,) int32, which says afterwards whether the survey is dense; 0 if nobody wants to know.
    """
    sizes, tables, keep_all = layout.sizes, layout.at(base), survivors is None
    bits = SurvivorBits(words=0, pitch_words=0, coarse_words=0) if keep_all else survivors
    token_ctas = 4 * layout.block_words
    make_weigh_kernel().launch(1, tokens, sizes, tables)
    make_list_kernel(smoothed).launch(token_ctas + (0 if keep_all else layout.chunks), token_ctas, tokens, bits, sizes, tables)
    make_order_kernel().launch(layout.chunks, keep_all, dense_share, sizes, tables)
    make_sort_kernel().launch(layout.column_tiles, bits, sizes, tables)
    make_rounds_kernel(fixed_tiles).launch(layout.blocks + 1, products.d_tiles_e, products.e_gate, sizes, tables)
    make_slots_kernel().launch(layout.rounds_max, sizes, tables)
    make_phases_kernel().launch(1, tokens, products.d_tiles_c, products.zero_fill, dense, sizes, tables)
