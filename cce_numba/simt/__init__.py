"""Portable kernels for any NVIDIA GPU, any dtype and shape, and for Numba's CUDA simulator: the ones to learn from.

They use shared-memory tiles and fused multiply-adds, and no warp-level operation. On a GPU they take CuPy arrays; with
NUMBA_ENABLE_CUDASIM=1 the same source runs on NumPy arrays, with tiny tiles.

`backend.py` is the way in. `product.py` is the building block of all large kernels; `tokens.py`, `indexed_dot.py`,
`forward.py` and `backward.py` hold the kernels in the order in which they run, each with the function that launches it.
"""
