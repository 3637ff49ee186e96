"""A small transformer, from tokens to embeddings. The loss takes it from there, with `head` as its classifier."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Size:
    """Sizes of a batch and of the model that it trains."""

    sequences: int
    length: int
    vocabulary: int
    hidden: int
    layers: int
    heads: int


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each added to its own input."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.up, self.down = nn.Linear(hidden, 4 * hidden, bias=False), nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(sequences, length, hidden) to the same shape."""
        q, k, v = self.qkv(normed(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(normed(x))))


class Transformer(nn.Module):
    """Tokens to embeddings; `head` (vocabulary, hidden) is the classifier. `positions` are learned: random tokens need none."""

    def __init__(self, size: Size, tied: bool, positions: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.hidden)
        self.positions = nn.Parameter(torch.empty(size.length, size.hidden)) if positions else None
        self.blocks = nn.ModuleList(Block(size.hidden, size.heads) for _ in range(size.layers))
        self.head = self.embedding.weight if tied else nn.Parameter(torch.empty_like(self.embedding.weight))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(sequences, length) to (sequences, length, hidden)."""
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions
        for block in self.blocks:
            x = block(x)
        return normed(x)


def normed(x: torch.Tensor) -> torch.Tensor:
    """The vectors of the last dimension, with a mean square of 1."""
    return F.rms_norm(x, x.shape[-1:])
