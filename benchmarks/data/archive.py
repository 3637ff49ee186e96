"""An archive of a language model's last layer, as it is stored: an npz file with a quantised classifier.

classifier_q (V, groups, size) int8 and classifier_scale (V, groups)   their product is the classifier (V, groups * size)
embeddings_bf16 (N, groups * size) uint16                              bit patterns of bfloat16 numbers
targets (N,)                                                           integers in [0, V)
loss_fp32 (N,)                                                         each token's known loss in nats
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from cce_numba.commands import npz
from cce_numba.commands.npz import Wanted

_WANTED = {
    "classifier_q": Wanted("i", 1, 3),
    "classifier_scale": Wanted("f", 4, 2),
    "embeddings_bf16": Wanted("u", 2, 2),
    "targets": Wanted("iu", 8, 1),
    "loss_fp32": Wanted("f", 8, 1),
}


@dataclass(frozen=True)
class Archive:
    """A real last layer: e (tokens, size) and c (vocabulary, size) in float32, targets (tokens,), known losses (tokens,)."""

    name: str
    e: np.ndarray
    c: np.ndarray
    targets: np.ndarray
    loss: np.ndarray

    def why_not(self, V: int, D: int) -> str | None:
        """Why it cannot be extended to a vocabulary of V and a hidden size of D, or None if it can."""
        vocabulary, size = self.c.shape
        return None if vocabulary <= V and size <= D else f"V must be at least {vocabulary} and D at least {size}"


def read(path: str) -> Archive:
    """Reads an archive. Raises OSError if that fails, ValueError for a file of another kind.

    The file is not trusted: nothing in it is executed, and shapes are checked before memory is taken for any array.
    """
    _check(npz.headers(path, _WANTED))
    stored = npz.arrays(path, _WANTED)
    q, targets = stored["classifier_q"], stored["targets"]
    if targets.min() < 0 or targets.max() >= len(q):
        raise ValueError(f"targets must lie in [0, {len(q)}), they lie in [{targets.min()}, {targets.max()}]")
    c = (q * stored["classifier_scale"][..., None].astype(np.float32)).reshape(len(q), -1)
    e = stored["embeddings_bf16"].view(ml_dtypes.bfloat16).astype(np.float32)
    return Archive(Path(path).name, e, c, targets, stored["loss_fp32"])


def _check(headers: dict[str, npz.Header]) -> None:
    """Raises ValueError unless the shapes fit each other and the float32 arrays fit into memory."""
    (V, groups, size), (N, D) = headers["classifier_q"].shape, headers["embeddings_bf16"].shape
    expected = {
        "classifier_scale": (V, groups),
        "embeddings_bf16": (N, groups * size),
        "targets": (N,),
        "loss_fp32": (N,),
    }
    for name, shape in expected.items():
        if headers[name].shape != shape:
            raise ValueError(f"{name} must have shape {shape} beside the other arrays, got {headers[name].shape}")
    if min(N, V, D) < 1:
        raise ValueError(f"holds {N} tokens, {V} entries and a hidden size of {D}")
    if headers["embeddings_bf16"].dtype != np.uint16:
        raise ValueError(f"embeddings_bf16 must be uint16, got {headers['embeddings_bf16'].dtype}")
    npz.require_memory(2 * 4 * D * (N + V))  # float32 numbers, and as many on the way to them
