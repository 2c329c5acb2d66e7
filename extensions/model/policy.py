"""One frozen base model in three roles: actor, critic and reference.

actor      LoRA adapter "default" on
critic     value head on the actor's trunk (shared), or on adapter "critic" of the same base
reference  adapters off: the untouched base, bit for bit; or the frozen adapter "reference" that training started from
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel

from extensions.common.files import apply_umask
from extensions.model.anatomy import Anatomy, captured, own_logits, states_of
from extensions.prefix.attention import Attend, PackAttention, attending, tree_masks
from extensions.prefix.decoding import Decoder, OwnDecoder, PaddedDecoder, TreeDecoder, UncachedDecoder
from extensions.prefix.limits import Form, PackLimit
from extensions.prefix.logprobs import Entropy, FusedLinearLogprob, token_entropy, token_logprobs
from extensions.prefix.products import use_fast_products
from extensions.prefix.tree import Pack

if TYPE_CHECKING:
    from extensions.model.proof import Proof

Role = Literal["actor", "critic", "reference"]
ADAPTER_OF: dict[Role, str] = {"actor": "default", "critic": "critic", "reference": "reference"}
LOGITS_AT_ONCE = 2**24  # entries per chunk of logits: 64 MB in float32


class ValueHead(nn.Module):
    """MLP on the trunk's last hidden states (section 3 of the paper): (..., hidden) -> (...), in float32.

    The last layer starts at zero: all values are 0 before the first update, and its value gradient does not reach the
    trunk.
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


@dataclass(frozen=True)
class ForwardPath:
    """A way to compute a model; `extensions.model.proof` shows whether it is exact."""

    kind: Literal["packed", "masked", "plain"]
    attention: str  # transformers' attn_implementation
    # How "plain" decodes: one left-padded cache for all rows; one cache per length; or no cache and a forward over
    # whole rows per token.
    cache: Literal["padded", "by length", "none"] = "padded"
    flash: bool = False  # "packed" by a flash kernel

    @property
    def form(self) -> Form:
        """What takes memory in a forward."""
        return "flash" if self.flash else self.kind

    def __str__(self) -> str:
        if self.kind == "packed" and self.flash:
            return "flash (shared prefixes, one call of a flash kernel per layer)"
        if self.kind == "packed":
            return "packed (shared prefixes, no masked pair is computed)"
        if self.kind == "masked":
            return f"masked (shared prefixes, a dense mask for {self.attention} attention)"
        decoding = {"padded": "a padded cache", "by length": "a cache per length", "none": "no cache, slow"}
        own = f"the model's own {self.attention} forward"
        return f"plain ({own}, no shared prefixes; decoding with {decoding[self.cache]})"


class Policy(nn.Module):
    """The base model with its adapters and value head.

    Every forward runs inside `with policy.role(...)`. The role must span the backward pass too: gradient checkpointing
    recomputes the forward there, with the adapters that are on at that time.

    Args:
        lm: causal LM with LoRA adapter "default", "critic" if the critic has an adapter, and "reference" if the
            reference is not the base.
        temperature: divides the logits, in sampling and in every logprob.
        value_head: whether there is a critic; SFT and evaluation have none.
        anatomy: of the base.
    """

    path: ForwardPath  # chosen by `extensions.model.proof`, with the evidence in `proof`
    proof: Proof

    def __init__(self, lm: PeftModel, temperature: float, value_head: bool, anatomy: Anatomy) -> None:
        super().__init__()
        self.lm = lm
        self.temperature = temperature
        self.anatomy = anatomy
        self.value_head = ValueHead(anatomy.hidden_size) if value_head else None
        self._role: Role | None = None
        for name, parameter in lm.named_parameters():
            parameter.requires_grad_("lora_" in name and ".reference." not in name)
        use_fast_products(self.causal_lm)

    @property
    def has_critic_adapter(self) -> bool:
        return "critic" in self.lm.peft_config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name: LoRA matrices, and the value head if there is one."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def parameter_groups(self, value_lr: float | None = None) -> list[dict[str, Any]]:
        """The trained parameters as groups of a torch optimizer: the adapters, and the value head if there is one.

        Args:
            value_lr: learning rate of the value head; None: that of the adapters.
        """
        head = [p for name, p in self.trainable.items() if name.startswith("value_head.")]
        adapters = [p for name, p in self.trainable.items() if not name.startswith("value_head.")]
        groups: list[dict[str, Any]] = [{"params": adapters}]
        if head:
            groups.append({"params": head} | ({} if value_lr is None else {"lr": value_lr}))
        return groups

    def train(self, mode: bool = True) -> Policy:
        """Training mode only for the adapters' dropout and gradient checkpointing; the frozen base stays in eval mode.

        Noise of the base (dropout, a sampling router) would make the updated policy differ from the one that sampled.
        """
        super().train(mode)
        self.causal_lm.eval()
        for module in self.causal_lm.modules() if mode else ():
            if isinstance(module, BaseTunerLayer):
                module.lora_dropout.train()
            elif isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                module.training = True  # transformers (5.15) checks the flag of this module only
        return self

    @property
    def adapted(self) -> list[str]:
        """Names of the layers that have LoRA matrices."""
        return [name for name, module in self.causal_lm.named_modules() if isinstance(module, BaseTunerLayer)]

    @contextmanager
    def role(self, role: Role) -> Iterator[None]:
        """Switch the adapters on or off. Does not nest.

        peft's `set_adapter` and `disable_adapter` also switch requires_grad, which the optimizer and ZeRO do not
        notice, and they fail silently between a forward and its backward. Here only the flags are set.
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

    @property
    def decoder(self) -> nn.Module:
        """The causal LM without its head."""
        return self.causal_lm.get_submodule(self.anatomy.trunk)

    def trunk(self, **inputs: Any) -> Any:
        """Output of the decoder without its head: states (B, T, hidden), and the cache on request."""
        assert self._role is not None, "a forward needs a role: with policy.role('actor'): ..."
        return self.decoder(**inputs)

    def last_states(self, **inputs: Any) -> tuple[Tensor, Any]:
        """Hidden states (B, hidden) of the last tokens in a forward of the whole model, and the model's output."""
        assert self._role is not None, "a forward needs a role: with policy.role('actor'): ..."
        with captured(self.decoder) as found:
            out = self.causal_lm(**inputs, return_dict=True)
        return found[0][:, -1], out

    def use(self, path: ForwardPath) -> None:
        """Switch to this path."""
        lm = self.causal_lm
        if lm.config._attn_implementation != path.attention and lm._can_set_attn_implementation():
            lm.set_attn_implementation(path.attention)
        self.path = path

    def packed_states(self, pack: Pack, attend: PackAttention | None = None) -> Tensor:
        """Hidden states (L, hidden) of a pack's tokens: all other forwards call it.

        Args:
            attend: packed attention to use; None: one without a cache.
        """
        most = self.anatomy.most_tokens
        if most is not None and pack.input_ids.shape[1] >= most and attend is None:
            return self._row_states(pack)
        if self.path.kind == "packed":
            attend = attend or PackAttention(pack, flash=self.path.flash)
            return self.token_states(pack.input_ids, pack.position_ids, attend)
        if self.path.kind == "masked":
            return self._masked_states(pack, use_cache=False)[0]
        return self._row_states(pack)

    def token_states(self, input_ids: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """Hidden states (L, hidden) of tokens (1, L) under the attention pattern `attend`."""
        with attending(attend):
            out = self.trunk(
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=torch.ones_like(input_ids),
                use_cache=False,
            )
        return states_of(out)[0]

    def packed_states_and_cache(self, pack: Pack) -> tuple[Tensor, DynamicCache]:
        """Hidden states by a dense mask, with keys and values (1, ..., L)."""
        return self._masked_states(pack, use_cache=True, past_key_values=DynamicCache())

    def _masked_states(self, pack: Pack, **cache: Any) -> tuple[Tensor, DynamicCache]:
        with tree_masks(pack, self.path.attention):
            out = self.trunk(
                input_ids=pack.input_ids,
                position_ids=pack.position_ids,
                attention_mask=torch.ones_like(pack.input_ids),
                **cache,
            )
        return states_of(out)[0], getattr(out, "past_key_values", None)

    def _row_states(self, pack: Pack) -> Tensor:
        """Hidden states by one whole row per sample, padded on the right, where causal attention ignores padding."""
        places = pack.places
        width = max(map(len, places))
        rows = torch.zeros(len(places), width, dtype=torch.long, device=self.device)
        mask = torch.zeros_like(rows)
        origin = torch.zeros(pack.input_ids.shape[1], dtype=torch.long, device=self.device)  # (L,) in the flat rows
        for row, own in enumerate(places):
            rows[row, : len(own)] = pack.input_ids[0, own]
            mask[row, : len(own)] = 1
            origin[own] = torch.arange(row * width, row * width + len(own), device=self.device)
        out = self.trunk(input_ids=rows, attention_mask=mask, use_cache=False)
        return states_of(out).flatten(0, 1)[origin]

    def prefill(self, prompts: Sequence[Sequence[int]], limit: PackLimit, new_tokens: int) -> Decoder:
        """Prefill prompts for decoding.

        Args:
            limit: bounds of a forward.
            new_tokens: most tokens to decode per row.
        """
        most, longest = self.anatomy.most_tokens, max(map(len, prompts)) + new_tokens
        if self.path.cache == "none" or (most is not None and longest >= most):
            return UncachedDecoder(self, prompts, limit)
        if most is not None:
            limit = replace(limit, rows=min(limit.rows, (most - 1) // longest))
        if self.path.kind == "plain":
            return OwnDecoder(self, prompts, limit, new_tokens, self.path.cache == "padded")
        if self.path.kind == "packed":
            return TreeDecoder(self, prompts, limit, new_tokens, self.path.flash)
        return PaddedDecoder(self, prompts, limit, new_tokens)

    def logits(self, states: Tensor, temperature: float | None = None) -> Tensor:
        """Logits over the temperature, float32: (..., hidden) -> (..., V). Large: pass only the places needed."""
        transform = self.anatomy.transform
        if transform is None:
            logits = own_logits(self.causal_lm, self.decoder, states).float()
        else:
            logits = transform(self.causal_lm.get_output_embeddings()(states).float())
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
        """Requested results for the pack's N targets: `logprobs`, `entropy`, `values`, each (N,) float32.

        A value is V(s_t) of the state before its token; without a value head there are none.

        Args:
            entropy: computed with the logprobs.
            temperature: of the logits; None: that of sampling.
        """
        states = self.packed_states(pack)[pack.predicting]
        result: dict[str, Tensor] = {}
        if logprobs:
            found = self._target_logprobs(states, pack.targets, entropy, temperature)
            result = dict(zip(("logprobs", "entropy"), found, strict=True))
            if entropy == "none":
                del result["entropy"]
        if values and self.value_head is not None:
            result["values"] = self.value_head(states)
        return result

    def _target_logprobs(
        self, states: Tensor, targets: Tensor, entropy: Entropy, temperature: float | None
    ) -> tuple[Tensor, Tensor]:
        """Logprobs and entropies, each (N,)."""
        head = self.causal_lm.get_output_embeddings()
        # Under ZeRO 3, and in float32 within the proof, weights exist only while their module is called.
        as_module = hasattr(head.weight, "ds_id") or any(p.dtype != states.dtype for p in head.parameters())
        if self.anatomy.transform is None or type(head) is not nn.Linear or as_module:
            logits = self.logits(states, temperature)
            return token_logprobs(logits, targets), token_entropy(
                logits if entropy == "differentiable" else logits.detach()
            )
        divisor = self.temperature if temperature is None else temperature
        rows = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
        found: tuple[Tensor, Tensor] = FusedLinearLogprob.apply(
            states, targets, head.weight, head.bias, divisor, rows, entropy, self.anatomy.transform
        )
        return found

    # ------------------------------------------------------------------------------------------------- saving

    def save_adapter(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write the actor's adapter in PEFT's format, safetensors; plain peft and transformers load it.

        Args:
            state: all trained parameters, unsharded (`strategy.trainable_state`).
        """
        self._save(folder, state, "default")

    def save_critic(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write the value head, and the critic's adapter if it has one; nothing without a critic."""
        if self.value_head is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        head = {name.removeprefix("value_head."): t for name, t in state.items() if name.startswith("value_head.")}
        save_file(head, folder / "value_head.safetensors")
        if self.has_critic_adapter:
            self._save(folder, state, "critic")
        apply_umask(folder)

    def _save(self, folder: Path, state: dict[str, Tensor], adapter: str) -> None:
        self.lm.save_pretrained(
            str(folder),
            selected_adapters=[adapter],
            state_dict={name.removeprefix("lm."): tensor for name, tensor in state.items()},
            save_embedding_layers=False,  # "auto" would ask the hub
        )
        apply_umask(folder)
