"""cuBLAS's one product `e @ c.T` in bfloat16: what a forward that computes every logit once is measured by."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from timing import Call

_PRODUCT_BYTES = 3e9  # at most, at a time


def product(e: Any, c: Any) -> Call:
    """The product, in parts of the vocabulary that take 3 GB each at most: into one piece of memory, if PyTorch is there."""
    parts = parts_of(len(e), len(c))
    torch = torch_with_cuda()
    if torch is None:
        if (dtype := (e[:1] @ c[:1].T).dtype) != e.dtype:
            raise RuntimeError(f"CuPy makes {dtype} of a product of {e.dtype}; PyTorch with CUDA is needed")

        def call() -> None:
            for part in parts:
                e @ c[part].T  # the pool gives it the memory of the part before
    else:
        e, c = as_torch(e), as_torch(c)
        out = torch.empty(len(e) * parts[0].stop, dtype=torch.bfloat16, device=e.device)
        places = [out[: len(e) * (part.stop - part.start)].view(len(e), -1) for part in parts]
        factors = [c[part].T for part in parts]

        def call() -> None:
            for factor, place in zip(factors, places, strict=True):
                torch.mm(e, factor, out=place)

    return call


def library() -> str:
    """Through which cuBLAS is called."""
    return "CuPy" if torch_with_cuda() is None else "torch.mm"


def parts_of(N: int, V: int) -> list[slice]:
    """Parts of the vocabulary, as few as possible: all but the last as large as the first, which is a multiple of 8."""
    count = -(-N * V * 2 // int(_PRODUCT_BYTES))
    width = -(-V // count // 8) * 8  # rows of the product start at multiples of 16 bytes
    return [slice(start, min(start + width, V)) for start in range(0, V, width)]


def as_torch(array: Any) -> Any:
    """A tensor on the memory of a CuPy array of integers or bfloat16."""
    torch = torch_with_cuda()
    if array.dtype.kind == "i":
        return torch.from_dlpack(array)
    return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)


@functools.cache
def torch_with_cuda() -> Any:
    """PyTorch, or None where it is not installed or has no GPU."""
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None
