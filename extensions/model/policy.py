"""One frozen base model in three roles: actor, critic and reference.

actor      LoRA adapter "default" on
critic     value head on the actor's trunk (shared), or on adapter "critic" of the same base
reference  adapters off: the untouched base, bit for bit; or the frozen adapter "reference" that training started from
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_utils import PreTrainedModel

from extensions.attention import NAME as PACKED
from extensions.attention import Attend, PackAttention
from extensions.compat import alibi_positions
from extensions.numerics import Entropy, OfLogits, token_entropy, token_logprobs
from extensions.packing import Pack

Role = Literal["actor", "critic", "reference"]
ADAPTER_OF: dict[Role, str] = {"actor": "default", "critic": "critic", "reference": "reference"}
LOGITS_AT_ONCE = 2**24  # numbers of a chunk of logits (64 MB in float32): a vocabulary of 152k is large


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
