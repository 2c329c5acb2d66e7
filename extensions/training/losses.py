"""The losses of PPO over the response tokens of a micro-batch.

Each is a sum over tokens divided by the tokens of the whole minibatch on all ranks, so neither micro-batches nor ranks
change it. OpenRLHF's losses take (B, T); a sum over tokens is the same over one row of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from extensions.distributed.openrlhf import PolicyLoss, ValueLoss, aggregate_loss, compute_approx_kl
from extensions.recipe import Ppo, Vllm
from extensions.training.experience import Experience, MicroBatch


@dataclass(frozen=True)
class Scale:
    """The divisor of a loss: the response tokens of the minibatch, of which each rank's gradient has its share."""

    tokens: Tensor  # () of all ranks
    ranks: int

    def arguments(self) -> dict[str, Tensor | int]:
        """As OpenRLHF's losses take it."""
        return {"dp_size": self.ranks, "batch_num_tokens": self.tokens}


@dataclass
class ActorLoss:
    """Policy loss of one micro-batch with n response tokens."""

    logprobs: Tensor  # (n,) under the current policy
    entropy: Tensor  # (n,)
    policy_loss: Tensor
    kl_loss: Tensor  # without its coefficient; 0 if the KL is a penalty in the reward
    clip_fraction: Tensor  # of its tokens
    is_fraction: Tensor  # of its tokens whose importance weight is outside the threshold; 0 without correction
    loss: Tensor  # policy loss with the entropy bonus and the KL


def is_options(settings: Vllm) -> dict[str, Any]:
    """Arguments of OpenRLHF's policy loss for the importance weights of tokens."""
    return {
        "is_correction_level": "token" if settings.corrects else "off",
        "is_correction_mode": settings.is_correction if settings.corrects else "mask",
        "is_correction_threshold": list(settings.is_threshold),
    }


class PpoLosses:
    """Policy, KL and value losses by the recipe's section `ppo`.

    Args:
        correction: of the difference between an engine that samples and the trainer; None: there is none.
    """

    def __init__(self, ppo: Ppo, correction: Vllm | None = None) -> None:
        self.ppo = ppo
        self.corrects = correction is not None and correction.corrects
        low, high = ppo.clip_range
        self.policy_loss = PolicyLoss(low, high, **is_options(correction) if correction is not None else {})
        self.value_loss = ValueLoss(clip_eps=ppo.value_clip)

    def actor(
        self, experience: Experience, out: dict[str, Tensor], part: MicroBatch, scale: Scale, kl_coef: float
    ) -> ActorLoss:
        """Clipped policy loss, less the entropy bonus, plus the KL where it is a loss.

        Args:
            out: logprobs and entropy (n,) of the forward over `part`.
            kl_coef: coefficient of the KL as a loss.
        """
        logprobs, entropy, arguments = out["logprobs"], out["entropy"], scale.arguments()
        old, kept = experience.logprobs[part.tokens], experience.kept[part.tokens]
        advantages = experience.advantages[part.tokens]
        sampled = experience.sampled[part.tokens][None] if self.corrects else None
        policy_loss, clip_fraction, *_, outside = self.policy_loss(
            logprobs[None], old[None], advantages[None], kept[None], sampled, **arguments
        )
        loss, kl_loss = policy_loss, policy_loss.new_zeros(())
        if self.ppo.entropy_coef > 0:
            loss = loss - self.ppo.entropy_coef * aggregate_loss(entropy[None], kept[None], **arguments)
        if self.ppo.kl.use_loss:
            estimator = self.ppo.kl.estimator
            # The gradient of k1 as it stands is 0 on average: that of the samples' logprobs.
            kl = compute_approx_kl(
                logprobs, experience.reference[part.tokens], old, estimator, unbiased_gradient=estimator == "k1"
            )
            kl_loss = aggregate_loss(kl[None], kept[None], **arguments)
            loss = loss + kl_coef * kl_loss
        # Of a micro-batch whose groups are all dropped, OpenRLHF's fraction is 0 / 0.
        outside = clip_fraction.new_zeros(()) if outside is None else outside
        clip_fraction, is_fraction = clip_fraction.nan_to_num(0.0), outside.nan_to_num(0.0)
        return ActorLoss(logprobs, entropy, policy_loss, kl_loss, clip_fraction, is_fraction, loss)

    def value(self, experience: Experience, out: dict[str, Tensor], part: MicroBatch, scale: Scale) -> Tensor:
        """Clipped value loss, without its coefficient."""
        old, returns = experience.values[part.tokens], experience.returns[part.tokens]
        kept = experience.kept[part.tokens]
        loss: Tensor = self.value_loss(out["values"][None], old[None], returns[None], kept[None], **scale.arguments())
        return loss
