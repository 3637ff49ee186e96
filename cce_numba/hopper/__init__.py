"""Tensor-core kernels for NVIDIA Hopper (sm_90a): tensor maps, bulk copies, warpgroup products, specialised warps.

Read in this order:

    tiles, schedule        sizes; who computes which tiles
    ring                   how tiles travel through shared memory
    producer, consumer     the two kinds of warpgroup
    fragment, fold         what happens to a tile of logits in registers
    forward                the kernel that these make, and all launches of a forward
    prepare, indexed_dot, merge, reduction    the small kernels before and after
    workspace, tensor_map, launch, cubin_cache, backend    the host's side
    backward/              the gradients

Instructions come from `cce_numba.ptx`.
"""
