"""Compiles kernels to machine code on a machine without a GPU, and reads what the compiler says of them.

Needs the compiler that numba-cuda's extras bring (`cuda12` or `cuda13`): NVVM for PTX, nvJitLink for the machine code.
"""

from __future__ import annotations

import functools
import importlib
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

from numba import config, cuda


@functools.cache
def why_not() -> str | None:
    """Why nothing can be compiled here, or None if it can."""
    if config.ENABLE_CUDASIM:
        return "the simulator compiles nothing"
    try:
        from cuda.bindings import nvjitlink

        nvjitlink.version()
        cuda.compile_ptx(lambda: None, cuda.types.void(), cc=(9, 0))
    except Exception as error:
        return f"numba-cuda finds no compiler here ({type(error).__name__}: {error}); extras cuda12 and cuda13 bring one"
    return None


@dataclass(frozen=True)
class Compiled:
    """A kernel's PTX and what the assembler reported.

    Attributes:
        ptx: its text.
        registers: of a thread.
        spilled_bytes: stored and loaded by a thread for want of registers.
        stack_bytes: of a thread: spills, and arrays that have an index at run time.
        smem_bytes: static shared memory of a CTA.
        log: all that the assembler said.
    """

    ptx: str
    registers: int
    spilled_bytes: int
    stack_bytes: int
    smem_bytes: int
    log: str

    def count(self, instruction: str) -> int:
        """How often an instruction (a regular expression) stands in the PTX; inline PTX may be many statements on a line."""
        return len(re.findall(rf"(?:^|[{{;:])\s*(?:@!?%?\w+ )?{instruction}(?![\w.:])", self.ptx, re.MULTILINE))

    @property
    def notices(self) -> list[str]:
        """What the assembler says with a number: that it ignored an instruction, or serialised some."""
        return re.findall(r"\(C\d+\).*", self.log)


def compile_function(
    function: Any, signature: Any, launch_bounds: tuple[int, ...] | None = (128, 1), cc: tuple[int, int] = (9, 0)
) -> Compiled:
    """Compiles a Python function as a kernel for a compute capability, as numba does for a device of it: for 9.0, sm_90a.

    With link-time optimisation, as `launch.kernel.Kernel` does: what is linked as PTX may call functions with any number of
    registers, so there the assembler ignores `setmaxnreg`.
    """
    full = (*cc, "a") if cc >= (9, 0) else cc
    code = _compile(function, signature, full, "ltoir", launch_bounds)
    options = f"-arch=sm_{''.join(map(str, full))}", "-lto"
    _, ptx = _link("LTOIR", code, *options, "-ptx")
    log, _ = _link("LTOIR", code, *options, "-verbose", "-Xptxas=-v")
    return _read(ptx, log)


def compile_launched(kernel: Any, cc: tuple[int, int] = (9, 0)) -> Compiled:
    """Compiles a `launch.kernel.Kernel` for a compute capability."""
    return compile_function(kernel.function, kernel.signature, (kernel.threads, kernel.ctas), cc)


def compile_hopper(kernel: Any) -> Compiled:
    """Compiles a `launch.kernel.Kernel` for sm_90a."""
    return compile_launched(kernel)


def _compile(function: Any, signature: Any, cc: tuple[Any, ...], output: str, launch_bounds: Any) -> Any:
    dispatcher = importlib.import_module("numba.cuda.dispatcher")
    # Device functions are compiled for "the current device", which is not there.
    with mock.patch.object(dispatcher, "get_current_device", return_value=SimpleNamespace(compute_capability=cc[:2])):
        code, _ = cuda.compile(
            function, signature, cc=cc, output=output, launch_bounds=launch_bounds, device=False, abi="numba"
        )
    return code


def _link(kind: str, data: bytes, *options: str) -> tuple[str, str]:
    """`(log, PTX)` of the linker, where the options ask for them."""
    from cuda.bindings import nvjitlink

    handle = nvjitlink.create(len(options), list(options))
    nvjitlink.add_data(handle, getattr(nvjitlink.InputType, kind), data, len(data), "kernel")
    try:
        nvjitlink.complete(handle)
    except nvjitlink.nvJitLinkError as error:
        error_log = bytearray(nvjitlink.get_error_log_size(handle))
        nvjitlink.get_error_log(handle, error_log)
        raise RuntimeError(error_log.decode().rstrip("\0")) from error
    log = bytearray(nvjitlink.get_info_log_size(handle))
    nvjitlink.get_info_log(handle, log)
    ptx = bytearray()
    if "-ptx" in options:
        ptx = bytearray(nvjitlink.get_linked_ptx_size(handle))
        nvjitlink.get_linked_ptx(handle, ptx)
    nvjitlink.destroy(handle)
    return log.decode().rstrip("\0"), ptx.decode().rstrip("\0")


def _read(ptx: str, log: str) -> Compiled:
    return Compiled(
        ptx,
        registers=int(re.search(r"[Uu]sed (\d+) registers", log)[1]),
        spilled_bytes=sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log))),
        stack_bytes=sum(map(int, re.findall(r"(\d+) bytes stack frame", log))),
        smem_bytes=int(match[1]) if (match := re.search(r"(\d+) bytes smem", log)) else 0,
        log=log,
    )
