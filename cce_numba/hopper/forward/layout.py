"""How a forward is cut, and where its tensor maps are."""

from __future__ import annotations

from dataclasses import dataclass

from cce_numba.hopper import tensor_map
from cce_numba.tensor_core import layout


@dataclass(frozen=True)
class Layout(layout.Layout):
    """How a problem is cut (`tensor_core.layout`), with scratch memory that begins with tensor maps."""

    @property
    def map_bytes(self) -> int:
        """The tensor maps of e and c."""
        return 2 * 8 * tensor_map.WORDS

    def scratch_bytes(self, numbers: int) -> int:
        """Tensor maps, and the partial results of a launch: `numbers` float32 for each token of each slot."""
        return self.map_bytes + super().scratch_bytes(numbers)
