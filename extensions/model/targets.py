"""`lora.target_modules`, resolved against the modules of a model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Literal

from peft import LoraConfig
from peft.tuners.tuners_utils import (
    _check_lora_target_modules_mamba,
    _find_minimal_target_modules,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from extensions.common.errors import UserError

# Names of a token mixer's projections in all families. MLA has q_b_proj and kv_b_proj, JetMoE kv_proj, RWKV receptance
# for the query, Zaya two halves of the value; a fused projection computes query, key and value at once.
QUERY = re.compile(r"(w|project_)?_?(q|query)(_b|_gate)?(_proj|_lin)?|receptance", re.IGNORECASE)
VALUE = re.compile(r"(w|project_)?_?(v|value|kv)(_b)?(_proj|_lin)?(_current|_delayed)?", re.IGNORECASE)
FUSED = re.compile(r"(w|in_proj_)?_?(qkvz?|query_key_value)(_proj|_lin)?|c_attn|att_proj|w_pack", re.IGNORECASE)
STATE_SPACE = re.compile(r"in_proj")  # Mamba: the mixer's input, gate and state projections in one
MIXER = re.compile(r"att|mixer|mamba|lstm|temporal|rwkv|conv", re.IGNORECASE)
# Path components outside the decoder's token mixers: MLP, experts, routers, the scoring of sparse attention,
# cross-attention, and towers of other modalities. BLT's patcher segments the text and is not trained.
OUTSIDE = re.compile(
    r".*mlp.*|.*ffn.*|ff|feed_?forward.*|.*experts?|.*router.*|indexer|compressor|cross_?att.*|encoder_attn|"
    r".*(vision|visual|image|img|audio|speech).*|patcher|.*embed.*",
    re.IGNORECASE,
)


def target_modules(
    model: PreTrainedModel, wanted: Literal["auto", "all-linear"] | Iterable[str]
) -> tuple[list[str] | str, list[str]]:
    """peft's `target_modules`, and the full names of the modules that it matches.

    The shortest names that match these modules only; a regular expression where names would need layer numbers.

    Raises:
        UserError: the model has no such modules, peft cannot wrap them, or their weights are tied to the embedding.
    """
    if wanted == "auto":
        names = _query_and_value(model)
    elif wanted == "all-linear":
        names = _all_linear(model)
    else:
        wanted = list(wanted)
        names = [name for target in wanted for name in _named(model, target)]
        return wanted, sorted(set(names))
    return _short(model, names), sorted(names)


def matching(model: nn.Module, config: LoraConfig) -> list[str]:
    """Full names of the modules that an adapter's config matches."""
    return sorted(name for name, _ in model.named_modules() if name and check_target_module_exists(config, name))


def tied_to_embedding(model: PreTrainedModel, names: Iterable[str]) -> str | None:
    """The first of the modules whose weight is tied between head and input embedding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None or getattr(head, "weight", None) is not embedding.weight:
        return None
    return next((name for name in names if model.get_submodule(name) in (head, embedding)), None)


def wrappable(model: PreTrainedModel) -> list[str]:
    """Full names of the modules that can have LoRA, without the head."""
    head = model.get_output_embeddings()
    return [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]


def _query_and_value(model: PreTrainedModel) -> list[str]:
    """The paper's choice in any family: query and value of each token mixer, or the fused projection.

    Models without them (Mamba) get the input projections of their mixers; unknown names get peft's list for the type.
    """
    inside = [name for name in wrappable(model) if not any(map(OUTSIDE.fullmatch, name.split(".")[:-1]))]
    for patterns in ((QUERY, VALUE, FUSED), (STATE_SPACE,)):
        found = [name for name in inside if any(pattern.fullmatch(_own_name(name)) for pattern in patterns)]
        if found:
            return found
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
    if known is not None:
        listed = matching(model, LoraConfig(target_modules=known))
        found = [name for name in inside if name in listed]
    if not found:
        raise UserError(
            f"lora.target_modules: auto finds no query and value projections in {type(model).__name__}; name the "
            f"modules, lora.target_modules=[NAME, ...], or use all-linear. {_layers(model)}"
        )
    return found


def _own_name(name: str) -> str:
    """The last meaningful component of a path: Moshi's projections are q_proj.linear."""
    parts = name.split(".")
    return parts[-2] if parts[-1] == "linear" and len(parts) > 1 else parts[-1]


def _all_linear(model: PreTrainedModel) -> list[str]:
    """The layers of peft's all-linear: every linear layer but the head, without those that peft refuses in Mamba."""
    config = LoraConfig(target_modules="all-linear")
    names = sorted(_maybe_include_all_linear_layers(config, model).target_modules)
    return [name for name in names if _refusal(model, name) is None]


def _refusal(model: PreTrainedModel, name: str) -> str | None:
    """Why a module cannot have LoRA; None if it can."""
    module = model.get_submodule(name)
    if not isinstance(module, (nn.Linear, Conv1D)):
        return f"is {type(module).__name__}; LoRA needs a linear layer here"
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name.rpartition(".")[2])
    except ValueError:
        return "is read by Mamba's kernels without its LoRA"
    return None


def _named(model: PreTrainedModel, target: str) -> list[str]:
    """The modules that a name in the recipe matches: all that end with it, as in peft."""
    names = matching(model, LoraConfig(target_modules=[target]))
    if not names:
        known = {name.rpartition(".")[2] for name in wrappable(model)}
        near = difflib.get_close_matches(target, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise UserError(f"lora.target_modules: the model has no linear layer {target!r}{hint} {_layers(model)}")
    tied = tied_to_embedding(model, names)
    if tied is not None:
        raise UserError(
            f"lora.target_modules: {target!r} is tied to the embedding in this model (tie_word_embeddings): a "
            "merged model cannot have one with LoRA and the other without; remove it"
        )
    for name in names:
        reason = _refusal(model, name)
        if reason is not None:
            raise UserError(f"lora.target_modules: {target!r}: {name} {reason}. {_layers(model)}")
    return names


def _layers(model: PreTrainedModel) -> str:
    """The names to choose from, attention first."""
    attention: set[str] = set()
    others: set[str] = set()
    for name in wrappable(model):
        path, _, last = name.rpartition(".")
        parts = path.split(".")
        mixes = any(map(MIXER.search, parts)) and not any(map(OUTSIDE.fullmatch, parts))
        (attention if mixes else others).add(last)
    shown = [f"{kind}: {', '.join(sorted(n))}" for kind, n in (("attention", attention), ("others", others)) if n]
    return f"Its linear layers: {'; '.join(shown) or 'none'}"


def short_names(model: PreTrainedModel, names: list[str]) -> list[str]:
    """The shortest names that match these modules only."""
    chosen = set(names)
    others = [name for name, _ in model.named_modules() if name and name not in chosen]
    return sorted(_find_minimal_target_modules(chosen, others))


def _short(model: PreTrainedModel, names: list[str]) -> list[str] | str:
    """The same, or a regular expression where these names would need layer numbers."""
    short = short_names(model, names)
    if not any(part.isdigit() for target in short for part in target.split(".")):
        return short
    patterns = sorted({re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) for name in names})
    regex = "|".join(patterns)
    exact = matching(model, LoraConfig(target_modules=regex)) == sorted(names)
    return regex if exact else short
