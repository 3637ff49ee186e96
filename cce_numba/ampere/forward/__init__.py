"""The forward: log-sum-exp, survivor bits and whatever else is folded from tiles of logits.

states   the states of a warp's rows: where they begin, and how four warps' become one
kernel   the kernel: a ring of stages, products, folds
host     all launches
"""
