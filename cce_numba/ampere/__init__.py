"""Kernels for tensor cores since 2020 (sm_80 to sm_120): products of a warp, `mma.sync`, fed by asynchronous copies.

    tiles        sizes, by the shared memory that a compute capability has
    product      a warp's part of a product: operands in registers, and the sums
    copies       rows on their way to shared memory
    forward/     log-sum-exp, survivors, and what else is folded from tiles of logits
    backward/    the gradients
    backend      what `cce_numba.backend` asks for

What these kernels share with those of other tensor cores is in `cce_numba.tensor_core`, instructions are in `cce_numba.ptx`.

The words: a *warp's part* of a CTA's tile is 64 rows by a fourth of the columns. Its rows are four *slabs* of 16. A *stage* is
room in shared memory for 64 terms of a product's operands; stages form a *ring*, and use u of the ring is of stage u % stages.
"""
