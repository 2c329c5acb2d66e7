"""Sentence embeddings by all-MiniLM-L6-v2, from an optional package that holds its files; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from extensions.distributed import watchdog
from extensions.model.packages import SENTENCE_ENCODER, is_installed, package_model

MAX_TOKENS = 256  # of a text; all-MiniLM-L6-v2 was trained with at most as many
BATCH_TOKENS = 1024  # with padding; on a CPU larger batches are slower (a fifth at 4096, one core)
BATCH_TOKENS_GPU = 2**16


def encoder_folder() -> Path | None:
    """Folder of the encoder's files; None if the package is not installed.

    Raises:
        UserError: see `package_model`.
    """
    return Path(package_model(SENTENCE_ENCODER)[0]) if is_installed(SENTENCE_ENCODER) else None


def embed(texts: Sequence[str], folder: Path, device: torch.device) -> Generator[None, None, Tensor]:
    """Unit vectors of texts: the mean of the last hidden states over a text's tokens, as sentence-transformers does.

    Returns:
        (n, D) float32, on the CPU; to be called by `yield from`. It yields after each batch.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModel.from_pretrained(str(folder), dtype=torch.float32).to(device).eval()
    distinct = list(dict.fromkeys(texts))
    tokens: list[list[int]] = tokenizer(distinct, truncation=True, max_length=MAX_TOKENS, padding=False)["input_ids"]
    vectors: dict[str, Tensor] = {}
    for batch in _batches(sorted(range(len(tokens)), key=lambda i: len(tokens[i])), tokens, device):
        watchdog.heartbeat()
        inputs = tokenizer.pad({"input_ids": [tokens[i] for i in batch]}, return_tensors="pt").to(device)
        with torch.inference_mode():
            states = model(**inputs).last_hidden_state  # (B, T, D)
        mask = inputs["attention_mask"][..., None]
        means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        vectors |= zip((distinct[i] for i in batch), means.cpu(), strict=True)
        yield
    return torch.stack([vectors[text] for text in texts])


def _batches(order: Sequence[int], tokens: Sequence[Sequence[int]], device: torch.device) -> Iterator[list[int]]:
    """Consecutive texts of `order`, which is by length, in batches of about equal padded size."""
    limit, batch = BATCH_TOKENS if device.type == "cpu" else BATCH_TOKENS_GPU, list[int]()
    for i in order:
        if batch and (len(batch) + 1) * len(tokens[i]) > limit:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
