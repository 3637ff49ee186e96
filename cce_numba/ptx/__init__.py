"""PTX instructions for kernels in `numba.cuda`: one Python function each, named after the mnemonic.

One module for each family. `instruction.py` makes them all: what stands in the other modules is PTX, operand types and why.
Sections named in docstrings are those of NVIDIA's *Parallel Thread Execution ISA*,
https://docs.nvidia.com/cuda/parallel-thread-execution/.

    instruction  the factory; checks operand types when a kernel is compiled
    memory       shared-memory addresses, loads, asynchronous copies, reductions
    pointers     addresses of pointers, and views of what they point to
    mbarrier     barriers in shared memory that count arrivals and bytes
    tma          tensor maps and the bulk copies that they describe
    wgmma        matrix products of a warpgroup on tensor cores
    mma          matrix products of a warp on tensor cores, and the loads of their operands
    cluster      CTAs that share their shared memory
    control      registers, named barriers, warp reductions
    arithmetic   single instructions for which Python has no name
"""
