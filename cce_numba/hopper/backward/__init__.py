"""The backward on tensor cores: what survives is surveyed, then one persistent kernel computes it in rounds.

Read in this order:

    tiles       sizes: every product runs through the same stages
    survey      survivor bits become lists, rounds and phases; by the small kernels of `columns` and `rounds`, into `tables`
    jobs        what a CTA computes next, and how a pair of CTAs goes about it
    load        how operands come to shared memory, panel by panel
    gather      and row by row
    multiply    a consumer's loop, and what it does for each kind of job
    epilogues   what becomes of a tile of sums
    kernel      the kernel that these make
    workspace, run    the host's side
"""
