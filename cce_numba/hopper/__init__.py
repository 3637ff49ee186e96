"""Kernels for NVIDIA Hopper (sm_90a): tensor maps, bulk copies, warpgroup products, specialised warps.

    tiles        sizes, and the shared memory that follows from them
    ring         how tiles travel through shared memory, from the producer to the consumers
    tensor_map   what the bulk copy engine is told of a matrix
    forward/     log-sum-exp, survivors, and what else is folded from tiles of logits
    backward/    the gradients
    distillation a student's head and a teacher's, by both
    backend      what `cce_numba.backend` asks for

What kernels for other tensor cores could use as well is in `cce_numba.tensor_core`, instructions are in `cce_numba.ptx`.
"""
