"""The parts of a causal LM, found by running it: trunk, head, and whether it is causal.

The trunk is the decoder without its head: token ids in, hidden states out. The head is all that the model's forward
computes between these states and the logits: usually a linear layer, scaled or capped in some families.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from extensions.common.errors import UserError
from extensions.model.precision import computing_in_float32
from extensions.prefix.logprobs import LogitTransform

PROBE = 12  # tokens of the probe
# Relative difference between two computations of the same logits that counts as rounding.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


@dataclass(frozen=True)
class Anatomy:
    trunk: str  # name of the trunk within the causal LM
    hidden_size: int  # of its states
    transform: LogitTransform | None  # of the linear head's output; None: use the model's own forward
    # A forward of this many tokens or more differs from forwards of single rows: Llama 4 scales queries by their index
    # in the forward instead of their position (transformers 5.15).
    most_tokens: int | None = None


def states_of(output: Any) -> Tensor:
    """Last hidden states (B, T, hidden) in a trunk's output."""
    states: Tensor = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
    return states


class _FixedOutput(tuple[Tensor]):
    """Stands in for a trunk's output: its states, and None for every other attribute."""

    def __getattr__(self, name: str) -> Tensor | None:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[0] if name == "last_hidden_state" else None


def own_logits(lm: PreTrainedModel, trunk: nn.Module, states: Tensor) -> Tensor:
    """Logits (..., V) of hidden states (..., hidden) by the model's own forward, its trunk replaced."""
    flat = states.reshape(1, -1, states.shape[-1])
    ids = torch.zeros(flat.shape[:2], dtype=torch.long, device=states.device)
    before = vars(trunk).get("forward")  # set where another library has patched it (accelerate)
    trunk.forward = lambda *args, **kwargs: _FixedOutput((flat,))
    try:
        logits: Tensor = lm(input_ids=ids, use_cache=False).logits
    finally:
        del trunk.forward
        if before is not None:
            trunk.forward = before
    return logits.reshape(*states.shape[:-1], -1)


@contextmanager
def captured(trunk: nn.Module) -> Iterator[list[Tensor]]:
    """The states that the trunk returns, one entry per call."""
    found: list[Tensor] = []
    hook = trunk.register_forward_hook(lambda module, args, output: found.append(states_of(output)))
    try:
        yield found
    finally:
        hook.remove()


@contextmanager
def eager(lm: PreTrainedModel) -> Iterator[None]:
    """Eager attention inside the context, if the model supports it: the reference of every comparison."""
    before = lm.config._attn_implementation
    if before == "eager" or not lm._can_set_attn_implementation():
        yield
        return
    lm.set_attn_implementation("eager")
    try:
        yield
    finally:
        lm.set_attn_implementation(before)


@torch.no_grad()
def examine(lm: PreTrainedModel) -> Anatomy:
    """The anatomy of a model. Raises UserError if it is not a causal LM over token ids."""
    with eager(lm):
        ids = _probe(lm)
        if not bool(torch.isfinite(_logits(lm, ids)).all()):
            raise UserError(
                f"model.path: {type(lm).__name__} gives logits that are NaN or infinite for a few plain tokens: its "
                f"files are damaged, or its dtype overflows ({lm.dtype}); try model.dtype=float32, or fetch the files "
                "again"
            )
        with computing_in_float32(lm):
            anatomy = _examine(lm, ids)
        with captured(lm.get_submodule(anatomy.trunk)) as states:
            _logits(lm, ids)
        head = lm.get_output_embeddings()
        if anatomy.transform is not None and states[0].dtype != head.weight.dtype:  # Mamba in bfloat16 rounds them
            return replace(anatomy, transform=None)
        return anatomy


def _probe(lm: PreTrainedModel) -> Tensor:
    """(1, PROBE) different token ids."""
    vocabulary = lm.get_input_embeddings().num_embeddings
    return torch.arange(PROBE, device=lm.device).mul_(7919).remainder_(vocabulary - 1).add_(1).unsqueeze(0)


def _logits(lm: PreTrainedModel, ids: Tensor) -> Tensor:
    try:
        logits: Tensor = lm(input_ids=ids, use_cache=False).logits.float()
    except Exception as error:  # a model's code may raise anything
        raise UserError(
            f"model.path: {type(lm).__name__} cannot be run on token ids alone in {lm.dtype}, so it is no language "
            f"model for this project ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error
    return logits


def _examine(lm: PreTrainedModel, ids: Tensor) -> Anatomy:
    name, dtype = type(lm).__name__, lm.dtype if getattr(lm, "is_quantized", False) else torch.float32
    called: list[nn.Module] = []
    hooks = [m.register_forward_hook(lambda module, args, output: called.append(module)) for m in _around(lm)]
    try:
        logits = _logits(lm, ids)
    finally:
        for hook in hooks:
            hook.remove()
    if not _close(_logits(lm, ids), logits, dtype):
        raise UserError(
            f"model.path: {name} gives different logits for the same tokens, so there is no reference to compare "
            "with; use a model whose forward is deterministic in eval mode"
        )
    shorter = _logits(lm, ids[:, : PROBE // 2])
    earlier = logits[:, : PROBE // 2]
    # On average: in low precision a mixture of experts may route a single token to another expert.
    if float((earlier - shorter).abs().mean()) > 10 * ROUNDING.get(dtype, 0.05) * float(earlier.abs().mean()):
        raise UserError(
            f"model.path: {name} is not causal: its logits at a token change with the tokens after it. This project "
            "trains decoder-only language models; for an encoder use launch/encoder.sh"
        )
    holders = [module for module in _around(lm) if module in called]
    if not holders:
        raise UserError(f"model.path: no decoder was found in {name}: no module that it calls contains its embeddings")
    trunk = holders[0]
    names = {module: path for path, module in lm.named_modules()}
    with captured(trunk) as states:
        lm(input_ids=ids, use_cache=False)
    if not _close(own_logits(lm, trunk, states[0]), logits, dtype):
        raise UserError(
            f"model.path: the logits of {name} are not a function of its decoder's last hidden states, so logprobs "
            "cannot be computed from them"
        )
    text = lm.config.get_text_config()
    most_tokens = getattr(text, "floor_scale", None) if getattr(text, "attn_temperature_tuning", False) else None
    transform = _transform(lm, trunk, states[0], dtype)
    return Anatomy(names[trunk], states[0].shape[-1], transform, most_tokens)


def _around(lm: PreTrainedModel) -> list[nn.Module]:
    """The modules that contain the input embeddings, outermost first, without the model itself."""
    embeddings = lm.get_input_embeddings()
    return [m for m in lm.modules() if m is not lm and m is not embeddings and embeddings in set(m.modules())]


def _transform(lm: PreTrainedModel, trunk: nn.Module, states: Tensor, dtype: torch.dtype) -> LogitTransform | None:
    """The transform of the linear head's output that gives the model's logits; None if no candidate does."""
    head = lm.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.in_features != states.shape[-1]:
        return None
    # Scaled up so that a cap takes effect.
    states = states * max(1.0, 30 / float(head(states).abs().max()))
    raw, logits = head(states).float(), own_logits(lm, trunk, states).float()
    config = lm.config.get_text_config()
    numbers = {
        key: float(value)
        for key, value in config.to_dict().items()
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    }
    scales = {v for key, v in numbers.items() if ("logit" in key or "lm_head" in key) and "cap" not in key}
    caps = {v for key, v in numbers.items() if "cap" in key and "attn" not in key}
    candidates = [
        LogitTransform(scale, cap) for cap in (None, *caps) for scale in (1.0, *scales, *(1 / v for v in scales))
    ]
    best = min(candidates, key=lambda candidate: float((candidate(raw) - logits).abs().max()))
    return best if _close(best(raw), logits, dtype) else None


def _close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    scale = float(b.abs().max()) + 1e-6
    return float((a.float() - b.float()).abs().max()) <= ROUNDING.get(dtype, 0.05) * scale
