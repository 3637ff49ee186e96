"""Compiled kernels: how they are described, compiled, kept on disk and launched. Every backend on a GPU launches through here.

    record        what belongs together reaches a kernel under one name
    packing       numba's types of a kernel's parameters, and their bytes as the driver takes them
    kernel        `Kernel`: one signature; it takes addresses, numbers and records
    array_kernel  `ArrayKernel`: it takes arrays, and is a `Kernel` for each combination of their dtypes and layouts
    simulator     what runs an `ArrayKernel` in Numba's simulator
    inlined       plain functions that kernels may call
    identity      what tells a kernel from all others
    cubin_cache   machine code on disk, under a name that says all that it depends on
    offline       kernels compiled for a device that is not there
    absent        a GPU that is not there, on which a call tells which kernels it launches

A kernel is made by a function with the decorator `kernel.kernel_factory`. The factory's arguments decide what is compiled: tile
sizes, dtypes, which terms a loss has.

Words: *machine code* is a cubin, what the driver loads. *Signature* is the numba types of a kernel's parameters. *Compute
capability* is the pair of numbers for which machine code is made; (9, 0) is Hopper.
"""
