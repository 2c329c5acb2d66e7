"""From recipe section `model` to a policy: files, tokenizer, config, weights, adapters."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError  # nosec B403 # only its exception class
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from peft import get_peft_model
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from extensions.common.errors import UserError
from extensions.model.adapters import load_adapter, lora_config
from extensions.model.anatomy import examine
from extensions.model.critic import load_critic
from extensions.model.hub import check_source
from extensions.model.packages import cached_folder, file_sha256, package_model
from extensions.model.policy import Policy
from extensions.model.proof import check_gradient, choose_path, synthetic_rows
from extensions.prefix.attention import NAME as PACKED
from extensions.prefix.tree import Sample
from extensions.recipe import Lora, Model, Recipe

CACHE_VERSION = 3  # raised when the output of `model_folder` changes, so that older copies are not used


def resolve_model(path: str) -> tuple[str, str | None]:
    """Folder (or hub name) and GGUF file of recipe key `model.path`.

    Raises:
        UserError: see `package_model`, for `pip:PACKAGE`.
    """
    if not path.startswith("pip:"):
        return path, None
    return package_model(path.removeprefix("pip:"))


def model_identity(path: str) -> str | None:
    """sha256 of config.json and of names, sizes and first MiB of the weight files; of a hub model, its commit.

    It tells models apart without reading all of their weights, and does not depend on the folder.
    """
    folder, gguf = resolve_model(path)
    root = Path(folder)
    if gguf is None and not root.is_dir():
        cached = try_to_load_from_cache(folder, "config.json")
        return Path(cached).parent.name if isinstance(cached, str) else None
    files = [root / gguf] if gguf is not None else sorted([*root.glob("*.safetensors"), *root.glob("*.bin")])
    config = root / "config.json"
    digest = hashlib.sha256(config.read_bytes() if gguf is None and config.is_file() else b"")
    for file in files:
        with file.open("rb") as opened:
            digest.update(f"{file.name} {file.stat().st_size}".encode() + opened.read(2**20))
    return digest.hexdigest()


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turns transformers' errors about a model path into a `UserError` of one sentence."""
    try:
        yield
    except UnpicklingError as error:
        raise UserError(
            f"model.path: {path!r} holds weights in a pickle (.bin) with objects other than tensors, which is not "
            "read: it could run code. Use a model in safetensors"
        ) from error
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers raises many types for damaged files
        if known := re.search(r"Unrecognized configuration class <class '[\w.]*?(\w+)'>", str(error)):
            raise UserError(
                f"model.path: {path!r} is no decoder-only language model: transformers has no causal LM for {known[1]}"
            ) from error
        if "trust_remote_code" in str(error):
            raise UserError(
                f"model.path: {path!r} comes with Python code, which is not run by default: read "
                "that code, then set model.trust_remote_code: true"
            ) from error
        raise UserError(
            f"model.path: cannot load {path!r}: it must be a local folder with a model, a reachable hub name, or "
            f"pip:PACKAGE. {type(error).__name__}: {' '.join(str(error).split())[:400]}"
        ) from error


def model_folder(model: Model) -> Path | str:
    """Folder (or hub name) of a model in transformers' format.

    A GGUF file is converted to float32 safetensors once, into the user's cache ($XDG_CACHE_HOME/nlu-ppo): transformers
    (5.15) reads SmolLM2-135M in 20 s from GGUF, and in half a second from safetensors.

    Raises:
        UserError: see `resolve_model`; or the cache cannot be written.
    """
    folder, gguf = resolve_model(model.path)
    if gguf is None:
        return folder
    source = Path(folder) / gguf
    name = f"{source.stem}-{file_sha256(source)[:16]}-{transformers.__version__}-{CACHE_VERSION}"
    return cached_folder(name, model.path, "converted", partial(_write_out, folder, gguf, model.path))


def _write_out(folder: str, gguf: str, path: str, target: Path) -> None:
    """Convert a GGUF file to a model in transformers' format."""
    with _explained(path):
        base, found = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    _check_complete(base, path, found)
    _set_special_tokens(tokenizer)
    base.save_pretrained(target)
    tokenizer.save_pretrained(target)


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Padding is tracked by lengths, so no pad token is needed."""
    check_source(model.path)
    with _explained(model.path):
        return AutoTokenizer.from_pretrained(model_folder(model), trust_remote_code=model.trust_remote_code)


def _set_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the special tokens that a GGUF file names.

    transformers (5.15, `GGUFLlamaConverter.tokenizer`) takes `bos_token_id` for EOS too and drops padding, but keeps
    the file's ids (`tokenizer.ggml.*_token_id`) among the tokenizer's settings.
    """
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token_id = tokenizer.init_kwargs.get(f"{name}_id")
        if token_id is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(token_id)))


def load_config(model: Model) -> Any:
    """The model's config, without weights."""
    check_source(model.path)
    with _explained(model.path):
        return AutoConfig.from_pretrained(model_folder(model), trust_remote_code=model.trust_remote_code)


def prompt_limit(recipe: Recipe, config: Any) -> int:
    """Most tokens of a prompt: the model's context minus the response, or the recipe's limit if that is lower.

    Args:
        config: of the model.

    Raises:
        UserError: the recipe's limits exceed the context.
    """
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or 2048
    context = min([context, *_rotary_switches(config)])
    limit = context - recipe.rollout.max_new_tokens
    if limit < 1:
        raise UserError(
            f"rollout.response_budget: {recipe.rollout.response_budget} leaves no room for a prompt in the model's "
            f"context of {context} tokens; lower it, or take a model with a longer context"
        )
    if recipe.prompt.max_tokens is not None and recipe.prompt.max_tokens > limit:
        raise UserError(
            f"prompt.max_tokens: {recipe.prompt.max_tokens} and rollout.response_budget: "
            f"{recipe.rollout.response_budget} exceed the model's context of {context} tokens"
        )
    return recipe.prompt.max_tokens or limit


def _rotary_switches(config: Any) -> list[int]:
    """Lengths beyond which a model changes the encoding of all positions of a row (LongRoPE).

    Beyond it, a logprob would depend on later tokens and on other rows of the batch, so it limits the context.
    """
    text = config.get_text_config()
    rotary = getattr(text, "rope_parameters", None) or {}
    found = []
    for one in (rotary, *(value for value in rotary.values() if isinstance(value, dict))):
        if one.get("rope_type") == "longrope":
            found.append(
                one.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
            )
    return [length for length in found if length]


def load_policy(
    model: Model,
    lora: Lora,
    critic: Literal["shared", "adapter", "none"],
    temperature: float,
    device: torch.device,
    seed: int,
    reference: Literal["start", "base"],
    training: bool = True,
    rows: Sequence[Sample] = (),
    same_forwards: bool = False,
    critic_from: Path | None = None,
) -> Policy:
    """The base model with a fresh adapter (or `model.adapter`), not yet wrapped by DeepSpeed.

    Its forward path has been compared with the model's own forward (`extensions.model.proof`). The base is frozen and
    keeps its dtype; adapters and value head are float32, initialised by `seed`.

    Args:
        critic: "none" for SFT and evaluation.
        reference: "start" keeps a frozen copy of `model.adapter` as the reference policy. A fresh adapter starts as the
            base, so there "start" is the base.
        training: whether `model.adapter` must match `lora`; in evaluation it may be any.
        rows: rows of the run to compare on; none: synthetic ones.
        same_forwards: whether all ranks must do equally many forwards (ZeRO 3).
        critic_from: folder of `critic_source`; None: a new value head, and a new critic adapter if there is one.

    Raises:
        UserError: the model or the adapter cannot be loaded, does not match the recipe, or has no exact path.
    """
    base = load_base(model, device)
    anatomy = examine(base)
    if model.gradient_checkpointing:
        if not base.supports_gradient_checkpointing:
            raise UserError(
                f"model.gradient_checkpointing: true, but transformers has none for {type(base).__name__}; set it to "
                "false"
            )
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(seed)
    if model.adapter is not None:
        lm = load_adapter(base, model.adapter, lora if training else None)
        if reference == "start":
            lm.load_adapter(model.adapter, "reference")
    else:
        settings = lora_config(base, lora)
        try:
            lm = get_peft_model(base, settings)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(
                f"lora.target_modules: peft cannot put LoRA on {settings.target_modules} of {type(base).__name__} "
                f"({' '.join(str(error).split())[:200]}); name other modules, or use auto"
            ) from error
    if critic == "adapter":
        config = copy.deepcopy(lm.peft_config["default"])
        config.inference_mode = False
        lm.add_adapter("critic", config)
    lm.peft_config["default"].base_model_name_or_path = model.path
    policy = Policy(lm, temperature, critic != "none", anatomy).to(device)
    if critic_from is not None:
        load_critic(policy, critic_from)
    rows = rows or synthetic_rows(base)
    policy.proof = choose_path(policy, model.attn_implementation, rows, same_forwards)
    if training:
        check_gradient(policy, rows[0])
    return policy


def load_base(
    model: Model, device: torch.device, dtype: torch.dtype | Literal["auto"] | None = None
) -> PreTrainedModel:
    """The frozen base model.

    Args:
        dtype: overrides the recipe's; auto: that of the files.
    """
    if dtype is None:
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": None}[model.dtype]
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if model.load_in_4bit and device.type == "cpu":
        raise UserError("model.load_in_4bit: true needs a GPU; set it to false")
    with _explained(model.path):
        options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
        config = without_dropout(load_config(model))
        options["config"] = config
        options["weights_only"] = True  # from pickled weights, load tensors only
        if model.load_in_4bit:
            options["device_map"] = {"": device}
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        base, found = AutoModelForCausalLM.from_pretrained(
            model_folder(model),
            dtype=dtype,
            attn_implementation=attention_of(model, config),
            output_loading_info=True,
            **options,
        )
    _check_complete(base, model.path, found)
    base.requires_grad_(False)
    return base if model.load_in_4bit else base.to(device)


def _check_complete(base: PreTrainedModel, path: str, found: dict[str, Any]) -> None:
    """Check that weights and config belong to one model. Weights of other modalities are ignored.

    Raises:
        UserError: weights are missing, which transformers would initialise at random, or unexpected.
    """
    modules = dict(base.named_modules())
    names = {module: name for name, module in modules.items()}
    layers = tuple(f"{names[module]}." for module in modules.values() if isinstance(module, torch.nn.ModuleList))
    spare = [
        name
        for name in found["unexpected_keys"]
        if name.startswith(layers) and (name.endswith(".weight") or isinstance(modules.get(name[:-5]), torch.nn.Linear))
    ]
    for keys, what in ((found["missing_keys"], "are missing from its files"), (spare, "have no place in the model")):
        if keys:
            first = sorted(keys)
            raise UserError(
                f"model.path: {path!r}: {len(first)} weights {what} ({', '.join(first[:2])}): config.json and weights "
                f"do not belong to one {type(base).__name__}; fetch the files again"
            )


def without_dropout(config: Any) -> Any:
    """The config with all dropout set to 0: layers under gradient checkpointing would apply it (`Policy.train`)."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for name, value in vars(part).items() if part is not None else ():
            if isinstance(value, float) and any(word in name for word in ("dropout", "pdrop", "layerdrop")):
                setattr(part, name, 0.0)
    return config


def attention_of(model: Model, config: Any) -> str:
    """The `attn_implementation` to load a model with: packed, sdpa or eager.

    Packed where the model uses transformers' attention interface (checked with 5.15). `extensions.model.proof` decides
    whether it is exact.
    """
    if model.attn_implementation not in ("auto", "flash"):
        return model.attn_implementation
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)  # None: remote code
    if kind is None or not kind._supports_attention_backend:
        return "sdpa" if kind is None or kind._supports_sdpa else "eager"
    return PACKED
