"""What the compiler makes of a kernel, on a machine with or without a GPU."""

from __future__ import annotations

import functools
import re
from typing import Any


@functools.cache
def why_not() -> str | None:
    """Why nothing can be compiled here, or None if it can."""
    from numba import config, cuda

    if config.ENABLE_CUDASIM:
        return "the simulator compiles nothing"
    try:
        cuda.compile_ptx(lambda: None, cuda.types.void(), cc=(8, 0))
    except Exception as error:
        return f"numba-cuda finds no compiler ({type(error).__name__}); `pip install 'cce_numba[cuda13]'` brings one"
    return None


def ptx(function: Any, signature: Any, compute_capability: tuple[int, int]) -> str:
    """The PTX of a Python function as a kernel. Raises RuntimeError if nothing can be compiled here."""
    from numba import cuda

    from cce_numba.launch.offline import compiling_for

    if reason := why_not():
        raise RuntimeError(reason)
    with compiling_for(compute_capability):
        code, _ = cuda.compile(function, signature, cc=compute_capability, output="ptx", device=False, abi="numba")
    return code.decode() if isinstance(code, bytes) else code


def instructions(text: str, *names: str) -> list[str]:
    """The lines of PTX that run one of these instructions, without blanks around them."""
    return [line.strip() for line in text.splitlines() if re.match(rf"\s*(?:{'|'.join(map(re.escape, names))})", line)]
