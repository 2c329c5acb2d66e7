"""MPT in transformers' attention interface, which its own code (5.15) is not written for.

Its attention adds ALiBi by the index of a key, which in a packed row is not its position. Here it passes queries, keys
and slopes to the packed attention, as the other families do; with any other implementation it is transformers' own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.models.mpt import modeling_mpt

from extensions.prefix.attention import NAME, Scores, Visible


class MptAttention(modeling_mpt.MptAttention):
    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.config = config

    def forward(self, hidden_states: Tensor, position_bias: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """(B, T, hidden) and the biases (heads, 1, positions) to (B, T, hidden) and transformers' attention weights."""
        mask = kwargs.pop("attention_mask")
        if not isinstance(mask, Visible):
            if self.config._attn_implementation == NAME:
                mask = ~mask  # sdpa's marks the visible keys, MPT's the others
            own: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, position_bias, attention_mask=mask, **kwargs
            )
            return own
        fused = self.Wqkv(hidden_states)
        if self.clip_qkv:
            fused = fused.clamp(-self.clip_qkv, self.clip_qkv)
        query, key, value = (x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for x in fused.chunk(3, -1))
        slopes = position_bias[:, 0, -1] - position_bias[:, 0, -2]
        out = mask.attend(self.layer_idx, query, key, value, Scores(self.softmax_scale, slopes=slopes), mask)
        return self.out_proj(out.flatten(2)), None


def has_alibi(model: PreTrainedModel) -> bool:
    """Whether its attention needs biases."""
    return any(isinstance(module, MptAttention) for module in model.modules())


def _set_attn_implementation(model: PreTrainedModel, attn_implementation: str) -> None:
    model.config._attn_implementation = attn_implementation  # transformers' own warns of the part `attn_config`


# Models that are loaded from now on use it.
modeling_mpt.MptAttention = MptAttention
modeling_mpt.create_causal_mask = partial(create_causal_mask, allow_is_causal_skip=False)  # MPT expects one always
modeling_mpt.MptPreTrainedModel._supports_attention_backend = True
modeling_mpt.MptPreTrainedModel._can_set_attn_implementation_cached_value = True
modeling_mpt.MptPreTrainedModel.set_attn_implementation = _set_attn_implementation
