"""Which problems `table1` measures, section by section: the most important ones first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.data import Shape

TABLE1, MODELS, VOCABULARY, TOKENS, HIDDEN, IGNORED = "table1", "models", "vocabulary", "tokens", "hidden", "ignored"
SECTIONS = {
    TABLE1: "the paper's Table 1",
    MODELS: "heads of models",
    VOCABULARY: "by vocabulary",
    TOKENS: "by tokens",
    HIDDEN: "by hidden size",
    IGNORED: "by the share of ignored tokens",
}
N, V, D = 8192, 256_000, 2304  # of the paper's Table 1: Gemma 2 (2B)
_HEADS = {  # vocabulary and hidden size, as the models' configurations have them
    "Llama 3 8B": (128_256, 4096),
    "Qwen 3 8B": (151_936, 4096),
    "Mistral NeMo": (131_072, 5120),
    "Gemma 2 9B": (256_000, 3584),
    "Phi 3.5 mini": (32_064, 3072),
    "Gemma 2 27B": (256_000, 4608),
    "Llama 3 405B": (128_256, 16_384),
}


@dataclass(frozen=True)
class Problem:
    """A problem of a section: its shape, the share of its tokens that are ignored, and a name for it."""

    section: str
    name: str
    shape: Shape
    ignored: float = 0.0

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from others in a record."""
        sizes = dict(zip("NVD", self.shape, strict=True))
        return {"section": self.section, "problem": self.name, **sizes, "ignored": self.ignored}


PROBLEMS = (
    Problem(TABLE1, "Gemma 2 2B", (N, V, D)),
    *(Problem(MODELS, name, (N, *head)) for name, head in _HEADS.items()),
    *(Problem(VOCABULARY, f"V={size}", (N, size, D)) for size in (128_000, 32_000, 8000, 64_000, 16_000)),
    *(Problem(TOKENS, f"N={size}", (size, V, D)) for size in (256, 1024, 32_768, 64, 4096, 16_384)),
    *(Problem(HIDDEN, f"D={size}", (N, V, size)) for size in (4096, 1024, 8192, 512)),
    *(Problem(IGNORED, f"{share:.0%} ignored", (N, V, D), share) for share in (0.5, 0.9, 0.25, 0.75)),
)
QUICK = (
    Problem(TABLE1, "small", (256, 2048, 256)),
    Problem(VOCABULARY, "V=1024", (256, 1024, 256)),
    Problem(IGNORED, "50% ignored", (256, 2048, 256), 0.5),
)
