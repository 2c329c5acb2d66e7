"""The models of OpenRLHF's groups: this project's policies behind OpenRLHF's interfaces, and the groups' strategy.

OpenRLHF's own (0.11.2) load every model with trust_remote_code, build LoRA without rank stabilisation, freeze the
critic's value head under LoRA (`get_peft_model` without modules_to_save) and compute each prompt separately. Here base,
adapters and value head come from `extensions.model`, so they give the numbers of the DeepSpeed backend, and samples
with a common prefix share it in one pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from extensions.distributed.openrlhf import Actor
from extensions.distributed.strategy import Strategy
from extensions.model.critic import critic_source
from extensions.model.loading import load_policy
from extensions.model.policy import Policy, Role
from extensions.prefix.logprobs import Entropy
from extensions.prefix.tree import Sample, pack
from extensions.recipe import Recipe


def samples_of(sequences: Tensor, attention_mask: Tensor, action_mask: Tensor) -> list[Sample]:
    """Prompts and responses of OpenRLHF's padded rows.

    Args:
        sequences, attention_mask: (B, T) token ids, and 1 where they are not padding, which is on the right.
        action_mask: (B, T - 1) 1 at the positions that predict a response token, without gaps.
    """
    lengths, firsts = attention_mask.sum(1).tolist(), action_mask.long().argmax(1).tolist()
    rows = zip(sequences.tolist(), lengths, firsts, strict=True)
    return [Sample(row[: first + 1], row[first + 1 : int(length)]) for row, length, first in rows]


def scatter(flat: Tensor, action_mask: Tensor) -> Tensor:
    """Values of all response tokens, (N,), at their positions in (B, T - 1); 0 elsewhere."""
    return flat.new_zeros(action_mask.shape).masked_scatter(action_mask.bool(), flat)


class PackedActor(Actor):
    """OpenRLHF's actor or reference around a policy that stays in one role.

    Args:
        policy: becomes `model`, which the strategy wraps in a DeepSpeed engine.
        entropy: computed when OpenRLHF asks for entropies.
    """

    def __init__(self, policy: Policy, role: Role, entropy: Entropy) -> None:
        super().__init__(policy)
        self.packing_samples, self.is_vlm, self.entropy = False, False, entropy
        self._role = ExitStack()  # open as long as the process lives, so that it spans each backward pass
        self._role.enter_context(policy.role(role))

    def forward(
        self,
        sequences: Tensor,
        action_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_output: bool = False,
        return_entropy: bool = False,
        **unused: Any,
    ) -> Any:
        """Logprobs (B, T - 1) of the response tokens; with `return_output` also their entropies."""
        assert action_mask is not None and attention_mask is not None
        packed = pack(samples_of(sequences, attention_mask, action_mask), sequences.device)
        out = self.model(packed, entropy=self.entropy if return_entropy else "none", values=False)
        logprobs = scatter(out["logprobs"], action_mask)
        if not return_output:
            return logprobs
        return logprobs, SimpleNamespace(entropy=scatter(out["entropy"], action_mask) if return_entropy else None)


class PackedCritic(nn.Module):
    """OpenRLHF's critic: base, adapter "critic" and the paper's value head, which is trained."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        for name, parameter in policy.named_parameters():
            if ".default." in name:  # the actor's adapter is trained in another process
                parameter.requires_grad_(False)
        self._role = ExitStack()  # as in PackedActor
        self._role.enter_context(policy.role("critic"))

    def forward(
        self,
        sequences: Tensor,
        action_mask: Tensor,
        attention_mask: Tensor,
        return_output: bool = False,
        **unused: Any,
    ) -> Any:
        """Values (B, T - 1) of the states before the response tokens."""
        packed = pack(samples_of(sequences, attention_mask, action_mask), sequences.device)
        values = scatter(self.policy(packed, logprobs=False)["values"], action_mask)
        return (values, SimpleNamespace()) if return_output else values


class RayStrategy(Strategy):
    """The strategy of a group: this project's optimizer, schedule and devices under OpenRLHF's arguments.

    Args:
        args: OpenRLHF's namespace.
        rows: samples on which each group verifies that it computes the model exactly.
    """

    def __init__(self, recipe: Recipe, args: Any, rows: Sequence[Sample]) -> None:
        super().__init__(recipe.seed, recipe.deepspeed, recipe.ppo.max_grad_norm)
        self.recipe, self.args, self.rows, self.world_size = recipe, args, rows, 1
        self.use_dynamic_batch = False
        self.train_batch_size = args.train.batch_size
        self.micro_train_batch_size = args.train.micro_batch_size

    def setup_distributed(self, *args: Any, **kwargs: Any) -> None:
        super().setup_distributed(*args, **kwargs)
        self.accumulated_gradient = self.train_batch_size // self.micro_train_batch_size // self.world_size

    def load(self, role: Role) -> Policy:
        """The policy of a group, with the initial values of the DeepSpeed backend under ppo.critic: adapter."""
        recipe = self.recipe
        return load_policy(
            recipe.model,
            recipe.lora,
            "adapter" if role == "critic" else "none",
            recipe.rollout.temperature,
            self.device,
            recipe.seed,
            recipe.ppo.kl.reference if role == "reference" else "base",
            rows=self.rows,
            same_forwards=self.stage == 3,
            critic_from=critic_source(recipe) if role == "critic" else None,
        )

    def wrap_trained(self, module: nn.Module, policy: Policy, num_updates: int) -> Any:
        """A DeepSpeed engine around a module that trains `policy`."""
        recipe = self.recipe
        groups = policy.parameter_groups(recipe.optimizer.value_lr)
        return self.wrap(module, groups, recipe.optimizer, recipe.schedule, num_updates)

    def engine_config(self) -> dict[str, Any]:
        return super().engine_config() | {
            "train_batch_size": self.train_batch_size,
            "train_micro_batch_size_per_gpu": self.micro_train_batch_size,
            "gradient_accumulation_steps": self.accumulated_gradient,
        }

    def _ds_init_eval_model(self, model: Any) -> Any:
        """Only ZeRO 3, which shards it, needs a DeepSpeed engine around a frozen model."""
        return super()._ds_init_eval_model(model) if self.stage == 3 else model.to(self.device)

    def optimizer_step(
        self, optimizer: torch.optim.Optimizer, model: Any, scheduler: Any, name: str = "model", **kwargs: Any
    ) -> None:
        """OpenRLHF's optimizer step, after a check of the reduced gradients.

        Raises:
            NonFiniteError: on every rank, before the update, if one is not finite.
        """
        engine = model.model if isinstance(model, Actor) else model
        if engine.is_gradient_accumulation_boundary():
            self.before_step(engine)
        engine.step()
