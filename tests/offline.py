"""Compiles kernels to machine code on a machine without a GPU, and reads what the compiler says of them.

Needs the compiler that numba-cuda's extras bring (`cuda12` or `cuda13`): NVVM for PTX, nvJitLink for the machine code.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

from numba import cuda


def why_not() -> str | None:
    """Why nothing can be compiled here, or None if it can."""
    try:
        from cuda.bindings import nvjitlink

        nvjitlink.version()
        cuda.compile_ptx(lambda: None, cuda.types.void(), cc=(9, 0))
    except Exception as error:
        return f"numba-cuda finds no compiler here ({type(error).__name__}: {error}); extras cuda12 and cuda13 bring one"
    return None


@dataclass(frozen=True)
class Compiled:
    """A kernel's PTX and what the assembler reported: registers of a thread, bytes spilled by it, shared memory of a CTA."""

    ptx: str
    registers: int
    spilled_bytes: int
    smem_bytes: int

    def count(self, instruction: str) -> int:
        """How often an instruction (a regular expression) stands in the PTX."""
        return len(re.findall(rf"^\s*(?:@!?%p\d+ )?{instruction}\b", self.ptx, re.MULTILINE))


def compile_kernel(kernel: Any, signature: Any, cc: tuple[int, int]) -> Compiled:
    """Compiles a `cuda.jit` dispatcher for a compute capability."""
    dispatcher = importlib.import_module("numba.cuda.dispatcher")
    # Device functions are compiled for "the current device", which is not there.
    with mock.patch.object(dispatcher, "get_current_device", return_value=SimpleNamespace(compute_capability=cc)):
        ptx, _ = cuda.compile_ptx(kernel.py_func, signature, cc=cc, launch_bounds=kernel.targetoptions.get("launch_bounds"))
    log = _assemble(ptx, f"sm_{cc[0]}{cc[1]}")
    return Compiled(
        ptx,
        registers=int(re.search(r"[Uu]sed (\d+) registers", log)[1]),
        spilled_bytes=sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log))),
        smem_bytes=int(match[1]) if (match := re.search(r"(\d+) bytes smem", log)) else 0,
    )


def _assemble(ptx: str, arch: str) -> str:
    from cuda.bindings import nvjitlink

    handle = nvjitlink.create(3, [f"-arch={arch}", "-verbose", "-Xptxas=-v"])
    data = ptx.encode()
    nvjitlink.add_data(handle, nvjitlink.InputType.PTX, data, len(data), "kernel")
    nvjitlink.complete(handle)
    log = bytearray(nvjitlink.get_info_log_size(handle))
    nvjitlink.get_info_log(handle, log)
    nvjitlink.destroy(handle)
    return log.decode()
