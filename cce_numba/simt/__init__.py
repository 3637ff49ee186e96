"""Portable kernels for any NVIDIA GPU, any dtype and shape, and for Numba's CUDA simulator: the ones to learn from.

They use shared-memory tiles and fused multiply-adds, and no warp-level operation. On a GPU they take CuPy arrays; with
NUMBA_ENABLE_CUDASIM=1 the same source runs on NumPy arrays, with tiny tiles.

`backend.py` is the way in. `product.py` is the building block of all large kernels. In the order in which they run: the
kernels of `tokens.py`, `indexed_dot.py` and `forward.py`, each with the function that launches it, then those of `columns.py`,
`gradient_of_logits.py` and `gradients.py`, which `backward.py` launches for each chunk of the vocabulary.
"""
