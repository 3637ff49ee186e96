"""Turns an archive of a language model's last layer into a file for `python -m cce_numba demo --data`.

The archive is an npz with `classifier_q (V, groups, size)` int8 and `classifier_scale (V, groups)`, whose product is
the classifier; `embeddings_bf16 (N, D)` uint16, bit patterns; `targets (N,)`; and `loss_fp32 (N,)`, each token's known
loss.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from collections.abc import Sequence

import ml_dtypes
import numpy as np

_KEYS = ("classifier_q", "classifier_scale", "embeddings_bf16", "targets", "loss_fp32")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make_demo_file", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE.npz")
    parser.add_argument("out", metavar="OUT.npz")
    parser.add_argument("--tokens", type=int, default=2048, help="how many tokens to take (default 2048)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of e and c: float32, in which both are exact (default), or bfloat16, which rounds c",
    )
    arguments = parser.parse_args(argv)
    try:
        arrays = demo_arrays(arguments.source, arguments.tokens, arguments.dtype)
        np.savez(arguments.out, **arrays)
    except OSError as error:  # says itself which file
        print(f"make_demo_file: error: {error}", file=sys.stderr)
        return 2
    except (ValueError, zipfile.BadZipFile) as error:
        print(f"make_demo_file: error: {arguments.source}: {error}", file=sys.stderr)
        return 2
    shapes = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())
    print(f"{arguments.out}: {shapes}")
    return 0


def demo_arrays(source: str, tokens: int | None, dtype: str) -> dict[str, np.ndarray]:
    """The arrays of the demo file, None for all tokens; raises ValueError for an archive of another kind or too few tokens."""
    archive = np.load(source, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError("is no npz file but a single array")
    with archive:
        if missing := [key for key in _KEYS if key not in archive]:
            raise ValueError(f"lacks {', '.join(missing)}")
        q, scale, bits, targets, loss = (archive[key] for key in _KEYS)
    if tokens is None:
        tokens = len(targets)
    if not 1 <= tokens <= len(targets):
        raise ValueError(f"--tokens must lie in [1, {len(targets)}], got {tokens}")
    e = bits[:tokens].view(ml_dtypes.bfloat16).astype(np.float32)
    c = (q * scale[..., None].astype(np.float32)).reshape(len(q), -1)
    if dtype == "bfloat16":  # by its bits, which any NumPy can read
        e, c = (array.astype(ml_dtypes.bfloat16).view(np.uint16) for array in (e, c))
    return {"e": e, "c": c, "targets": targets[:tokens], "loss": loss[:tokens]}


if __name__ == "__main__":
    sys.exit(main())
