"""Plain functions of the package that kernels may call: Numba compiles them into the kernel, wherever they are called from.

They are plain so that modules which import no Numba have them too. Kernels import them from here, where they are registered.
"""

from __future__ import annotations

from numba.extending import register_jitable

from cce_numba import logit

finish = register_jitable(logit.finish)
slope_of_cap = register_jitable(logit.slope_of_cap)
