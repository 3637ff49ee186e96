"""Tensor-core kernels for NVIDIA Hopper (sm_90a): tensor maps, bulk copies, warpgroup products, specialised warps.

Read in this order: `tiles` (sizes), `schedule` (who computes which tiles), `ring` (how tiles travel), `forward` (the kernel),
`fragment` and `fold` (what happens to a tile of logits in registers). Instructions come from `cce_numba.ptx`.
"""
