"""Merging base and adapter into one plain model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from extensions.common.errors import UserError
from extensions.common.files import apply_umask, sync_file, sync_folder
from extensions.model.adapters import adapter_config, load_adapter
from extensions.model.loading import load_base, load_config, load_tokenizer, resolve_model
from extensions.model.precision import computing_in_float32
from extensions.recipe import Model

CPU = torch.device("cpu")
# Nats, mean over the checked tokens, both sides computed in float32. Merging in float32 only reorders additions;
# otherwise the merged weights are rounded once more, by a relative error of up to 2^-9 (bfloat16) or 2^-12 (float16).
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.03, torch.float16: 0.005}
TEXTS = (
    "The film was long, but nobody in the room wanted it to end.",
    "Question: is 17 a prime number? Answer: yes, since only 1 and 17 divide it.",
)


@dataclass(frozen=True)
class Merged:
    """Measured on the written model, loaded from disk again; logprobs in nats."""

    dtype: torch.dtype
    layers: int  # with LoRA
    tokens: int  # whose logprobs were compared
    mean: float  # difference of merged model and base with adapter
    worst: float
    effect: float  # difference of base with and without adapter, mean

    def __str__(self) -> str:
        return (
            f"{self.layers} layers merged, {_names([self.dtype])}; logprobs of {self.tokens} tokens: "
            f"merged model and base with adapter differ by {self.mean:.2g} on average and {self.worst:.2g} at most "
            f"(allowed: {TOLERANCE[self.dtype]:g} on average); with and without adapter by {self.effect:.2g} on average"
        )


def merge_adapter(model: Model, folder: Path, complete: Callable[[Path], None] = lambda folder: None) -> Merged:
    """Write base and adapter of `model` as one plain model with its tokenizer, to be used as `model.path`.

    The folder appears only when it is complete and was compared with base and adapter. The dtype is that of the base's
    files, or the recipe's for a GGUF file.

    Args:
        complete: adds files to the folder before it is renamed into place.

    Raises:
        UserError: `model.adapter` is missing, base or adapter cannot be loaded or merged, the folder exists and is not
            empty or cannot be written, or the merged model differs from base and adapter.
    """
    if model.adapter is None:
        raise UserError(
            "model.adapter: missing; name the adapter to merge, for example model.adapter=runs/NAME/adapter"
        )
    adapter_config(model.adapter)
    with _new_folder(folder) as written:
        # Eager attention is exact in every family, and fast enough for a few tokens.
        plain = model.model_copy(update={"attn_implementation": "eager", "gradient_checkpointing": False})
        base = load_base(plain, CPU, "auto" if resolve_model(model.path)[1] is None else None)
        if base.dtype not in TOLERANCE:
            raise UserError(
                f"model.path: {model.path!r} is in {base.dtype}, which cannot be merged; use a bfloat16 model"
            )
        lm = load_adapter(base, model.adapter, None).eval()
        _refuse_shared(lm, model.adapter)
        rows = _rows(model)
        expected = _logprobs(lm, rows)
        with lm.disable_adapter():
            effect = (_logprobs(lm, rows) - expected).abs().mean().item()
        layers = _merge(lm, model.adapter)
        base = lm.unload()
        saved_dtype = base.dtype
        config = load_config(model)  # as on disk, without the changes that loading makes
        base.config = config if type(config) is type(base.config) else config.get_text_config()
        _save(base, model.path, written)
        load_tokenizer(model).save_pretrained(written)
        del lm, base
        again = load_base(plain.model_copy(update={"path": str(written), "adapter": None}), CPU, "auto").eval()
        apart = (_logprobs(again, rows) - expected).abs()
        merged = Merged(saved_dtype, layers, apart.numel(), apart.mean().item(), apart.max().item(), effect)
        if not merged.mean <= TOLERANCE[saved_dtype] or again.dtype != saved_dtype:  # also raised for NaN
            raise UserError(f"{folder}: not written: the merged model differs from base and adapter: {merged}")
        complete(written)
    return merged


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder, renamed to `folder` at the end and removed after an error."""
    try:
        goal = folder.expanduser().resolve()
        if goal.exists() and not goal.is_dir():
            raise UserError(f"{folder}: exists and is no folder; name a new folder for the merged model")
        if goal.is_dir() and any(goal.iterdir()):
            raise UserError(f"{folder}: is not empty; name a new folder for the merged model")
        beside = next(parent for parent in goal.parents if parent.exists())
        with tempfile.TemporaryDirectory(dir=beside, prefix=f".{goal.name}.") as temporary:
            written = Path(temporary) / goal.name  # the temporary folder has mode 0700
            written.mkdir()
            yield written
            apply_umask(written)
            for path in written.rglob("*"):
                if path.is_file():
                    sync_file(path)
            sync_folder(written)
            goal.parent.mkdir(parents=True, exist_ok=True)
            written.rename(goal)
            sync_folder(goal.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: the merged model cannot be written there: {error}") from error


def _refuse_shared(lm: PeftModel, path: str) -> None:
    """Raises UserError where a weight with LoRA is tied to another module, which merging would change too."""
    users: dict[int, list[str]] = {}
    for name, weight in lm.get_base_model().named_parameters(remove_duplicate=False):
        users.setdefault(id(weight), []).append(name.replace(".base_layer.", "."))
    for name, module in lm.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            others = [user for user in users[id(module.get_base_layer().weight)] if user != f"{name}.weight"]
            if others:
                raise UserError(
                    f"model.adapter: {path!r} has LoRA on {name}, whose weight is also that of {others[0]} (tied), so "
                    "merging would change that too; use base and adapter unmerged (model.adapter), or train an "
                    "adapter without that layer"
                )


def _merge(lm: PeftModel, path: str) -> int:
    """Add each layer's delta to its weight in float32, rounded once to the weight's dtype. Returns their number."""
    layers = [module for module in lm.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        base = layer.get_base_layer()
        dtype = base.weight.dtype
        base.to(torch.float32)
        try:
            layer.merge(safe_merge=True)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"model.adapter: {path!r} cannot be merged: {error}") from error
        base.to(dtype)
    return len(layers)


def _save(base: PreTrainedModel, path: str, folder: Path) -> None:
    generation = base.generation_config
    if generation is not None and not generation.do_sample:
        # Some models set these without do_sample (Vicuna). They have no effect, but transformers refuses to save them.
        for key in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            setattr(generation, key, None)
    try:
        base.save_pretrained(folder)
    except ValueError as error:
        raise UserError(f"model.path: {path!r} cannot be saved: {' '.join(str(error).split())[:400]}") from error


def _rows(model: Model) -> list[Tensor]:
    """Token ids (1, T) of the fixed texts."""
    tokenizer = load_tokenizer(model)
    return [torch.tensor([tokenizer.encode(text)]) for text in TEXTS]


@torch.no_grad()
def _logprobs(lm: PreTrainedModel | PeftModel, rows: list[Tensor]) -> Tensor:
    """Logprobs of all tokens but the first of each row: (N,), computed in float32."""
    found = []
    with computing_in_float32(lm):
        for ids in rows:
            logprobs = lm(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            found.append(logprobs.gather(-1, ids[:, 1:, None]).flatten())
    return torch.cat(found)


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
