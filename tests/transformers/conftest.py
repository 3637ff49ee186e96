"""What the tests of patched models are given."""

from __future__ import annotations

import pytest


@pytest.fixture
def batch():
    from tests.transformers.models import B, S, V, torch

    torch.manual_seed(1)
    tokens = torch.randint(3, V, (B, S))
    labels = tokens.clone()
    labels[0, :4] = -100
    labels[1, -3:] = -100
    return {"input_ids": tokens, "labels": labels, "use_cache": False}
