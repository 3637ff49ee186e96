"""cuBLAS's one product `e @ c.T` in bfloat16: the floor for a forward that computes every logit once."""

from __future__ import annotations

from benchmarks.data import Inputs
from benchmarks.measure import device
from benchmarks.measure.device import Call

_PRODUCT_BYTES = 3e9  # at most, at a time


def product(inputs: Inputs) -> Call:
    """The product, in parts of the vocabulary of at most 3 GB, which one after the other go to the same memory.

    PyTorch calls cuBLAS if it is there, since it can be told where to write; otherwise CuPy does.
    """
    e, c, _ = inputs
    parts = parts_of(len(e), len(c))
    torch = device.torch_with_cuda()
    if torch is None:
        if (dtype := (e[:1] @ c[:1].T).dtype) != e.dtype:
            raise RuntimeError(f"CuPy makes {dtype} of a product of {e.dtype}; PyTorch with CUDA is needed")

        def call() -> None:
            for part in parts:
                e @ c[part].T  # the pool gives it the memory of the part before
    else:
        e, c = device.as_torch(e), device.as_torch(c)
        out = torch.empty(len(e) * parts[0].stop, dtype=torch.bfloat16, device=e.device)
        places = [out[: len(e) * (part.stop - part.start)].view(len(e), -1) for part in parts]
        factors = [c[part].T for part in parts]

        def call() -> None:
            for factor, place in zip(factors, places, strict=True):
                torch.mm(e, factor, out=place)

    return call


def library() -> str:
    """Through which library cuBLAS is called."""
    return "CuPy" if device.torch_with_cuda() is None else "torch.mm"


def parts_of(N: int, V: int) -> list[slice]:
    """Parts of the vocabulary, as few as possible; all but the last are as large as the first, a multiple of 8 entries."""
    count = -(-N * V * 2 // int(_PRODUCT_BYTES))
    width = -(-V // count // 8) * 8  # rows of the product start at multiples of 16 bytes
    return [slice(start, min(start + width, V)) for start in range(0, V, width)]
