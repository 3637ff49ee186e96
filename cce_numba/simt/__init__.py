"""Portable kernels for any NVIDIA GPU, any dtype and shape, and for Numba's CUDA simulator: the ones to learn from.

They use shared-memory tiles and fused multiply-adds, and no warp-level operation. On a GPU they take CuPy arrays. With
NUMBA_ENABLE_CUDASIM=1 the same source runs in Python, on NumPy arrays, with tiny tiles, and a debugger can step through it.

Reading order:

    records               what kernels take together: tokens, terms of a logit, weights, survivors, columns
    tiles, numbers        sizes; how 16-bit numbers are read and written
    staging, product      parts of two matrices in shared memory, and the product of them in registers
    logits                a product becomes a logit

    tokens, indexed_dot   the list of tokens that count; the logit of each one's target
    draws                 the draws of the unbiased filter, and their seed
    folds/                what becomes of a tile of logits; `max_sum` is the log-sum-exp
    forward               tiles of logits, folded; then splits merged

    columns               which columns each block of tokens keeps, as a list
    chance                which of these survive by chance, and what they are multiplied by
    gradient_of_logits    G, for those alone
    gradient_of_c, _e, _bias    the gradients from G
    backward              all of it, chunk by chunk
    distillation          a student's head and a teacher's

    backend               what `backend.Backend` asks for

Each kernel stands in a function that makes it for some tile sizes and dtypes, so that these are constants to the compiler.
Beside it stands the host function that launches it, without the suffix `_kernel`.

Words:

    CTA       a block of threads that share memory; "block" is said of tokens
    block     `block_n` neighbouring tokens out of those that count; a CTA owns one, and they share survivor bits
    tile      a part of a matrix that one CTA computes at a time: `block_n` by `block_v` numbers
    split     one of the parts that the vocabulary is cut into where CTAs share a block of tokens
    chunk     one of the parts that the backward goes through one after the other, as many entries as G has memory for
    column    a vocabulary entry, seen from the logits
    position  a token's place in the list of those that count; its *number* is its place in `e`
    part      of a row: what one split has found of it
    G         the gradient of the loss with respect to the logits
    real      the dtype that is computed in: float64 for float64 inputs, float32 for all others
    dead      of a token: without any weight, so that nothing flows back into its row
"""
