"""What a backward's kernel is made for."""

from __future__ import annotations

from dataclasses import dataclass

from cce_numba.arguments import Problem
from cce_numba.backend import Weights
from cce_numba.tensor_core.divergence import TeacherForm


@dataclass(frozen=True)
class GradientForm:
    """What goes into an entry of G, and what else is wanted of G. A kernel looks at nothing that it was not made for.

    Attributes:
        capped: logits have a softcap.
        scaled: logits have a scale for each token.
        smoothed: G is less by a uniform weight of each token times class weights.
        entropic: G has p * log(p) times a weight of each token.
        several: tokens have several targets.
        with_sums: the gradient of the bias is wanted: the sum of each column of G.
        by_chance: columns survive by chance, see `chance`. Nothing is filtered where logits are smoothed.
        teacher: G is that of a divergence from this teacher, see `divergence`; nothing else goes into it then, and nothing is
            filtered. None without a teacher.
    """

    capped: bool = False
    scaled: bool = False
    smoothed: bool = False
    entropic: bool = False
    several: bool = False
    with_sums: bool = False
    by_chance: bool = False
    teacher: TeacherForm | None = None

    @staticmethod
    def of(
        p: Problem, weights: Weights, *, with_sums: bool, by_chance: bool, teacher: TeacherForm | None = None
    ) -> GradientForm:  # fmt: skip
        """That of a problem's backward."""
        return GradientForm(
            capped=p.options.softcap is not None,
            scaled=p.logit_scale is not None,
            smoothed=weights.uniform is not None,
            entropic=weights.entropy is not None,
            several=p.K is not None,
            with_sums=with_sums,
            by_chance=by_chance,
            teacher=teacher,
        )
