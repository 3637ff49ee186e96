"""The backend for NumPy arrays, with no GPU: vocabulary blocks through the BLAS, folded while they are in the cache.

`backend.py` is the way in; `forward.py` and `backward.py` are the loops over blocks, `fold.py` the work on their elements.
"""
