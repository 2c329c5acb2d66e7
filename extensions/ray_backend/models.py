"""What OpenRLHF's groups hold here: the models of this project behind OpenRLHF's interfaces, and their strategy.

OpenRLHF's own (0.11.2) load any model with trust_remote_code, make LoRA without rank stabilisation, freeze the critic's
value head under LoRA (`get_peft_model` without modules_to_save) and compute every prompt by itself. Here the base, the
adapters and the value head are those of `extensions.model`, so their numbers are those of the DeepSpeed loop, and rows
that begin alike share that beginning in one pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from extensions.distributed.openrlhf import Actor
from extensions.distributed.strategy import Strategy
from extensions.model.loading import load_policy
from extensions.model.policy import Policy, Role
from extensions.prefix.logprobs import Entropy
from extensions.prefix.tree import Pack, Sample, pack
from extensions.recipe import Recipe


def samples_of(sequences: Tensor, attention_mask: Tensor, action_mask: Tensor) -> list[Sample]:
    """Prompts and responses of OpenRLHF's padded rows.

    Args:
        sequences, attention_mask: (B, T) token ids, and 1 where they are not padding, which is on the right.
        action_mask: (B, T - 1) 1 at the places that predict a response token; these are without a gap.
    """
    lengths, firsts = attention_mask.sum(1).tolist(), action_mask.long().argmax(1).tolist()
    rows = zip(sequences.tolist(), lengths, firsts, strict=True)
    return [Sample(row[: first + 1], row[first + 1 : int(length)]) for row, length, first in rows]


def placed(flat: Tensor, action_mask: Tensor) -> Tensor:
    """Numbers of all response tokens (N,) at their places (B, T - 1); 0 elsewhere."""
    result = flat.new_zeros(action_mask.shape)
    result[action_mask.bool()] = flat
    return result


class PackedActor(Actor):
    """OpenRLHF's actor or reference around a policy that stays in one role.

    Args:
        policy: becomes `model`, around which the strategy puts its engine.
        entropy: what is computed where OpenRLHF asks for entropies.
    """

    def __init__(self, policy: Policy, role: Role, entropy: Entropy) -> None:
        super().__init__(policy)
        self.packing_samples, self.is_vlm, self.entropy = False, False, entropy
        self._for_life = ExitStack()  # of this process, so the role spans each backward pass too
        self._for_life.enter_context(policy.role(role))

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
        packed: Pack = pack(samples_of(sequences, attention_mask, action_mask), sequences.device)
        out = self.model(packed, entropy=self.entropy if return_entropy else "none", values=False)
        logprobs = placed(out["logprobs"], action_mask)
        if not return_output:
            return logprobs
        entropy = placed(out["entropy"], action_mask) if return_entropy else None
        return logprobs, SimpleNamespace(entropy=entropy)


class PackedCritic(nn.Module):
    """OpenRLHF's critic: base, adapter "critic" and the paper's value head. The head is trained (a test)."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.mean, self.std = 0.0, 1.0  # OpenRLHF prints them; rewards are not normalised
        for name, parameter in policy.named_parameters():
            if ".default." in name:  # of the actor, which is another process's
                parameter.requires_grad_(False)
        self._for_life = ExitStack()
        self._for_life.enter_context(policy.role("critic"))

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
        values = placed(self.policy(packed, logprobs=False)["values"], action_mask)
        return (values, SimpleNamespace()) if return_output else values


class RayStrategy(Strategy):
    """The strategy of a group: this project's optimizer, schedule and devices under OpenRLHF's settings.

    Args:
        args: OpenRLHF's namespace.
        rows: of the run, on which each group proves that it computes the model exactly.
    """

    def __init__(self, recipe: Recipe, args: Any, rows: Sequence[Sample]) -> None:
        super().__init__(recipe.seed, recipe.deepspeed, recipe.ppo.max_grad_norm)
        self.rows = rows
        self.recipe, self.args, self.world_size = recipe, args, 1
        self.use_dynamic_batch = False
        self.train_batch_size = args.train.batch_size
        self.micro_train_batch_size = args.train.micro_batch_size

    def print(self, *words: Any) -> None:
        """OpenRLHF prints its models and settings; nobody reads them."""

    def setup_distributed(self, *args: Any, **kwargs: Any) -> None:
        super().setup_distributed(*args, **kwargs)
        self.accumulated_gradient = self.train_batch_size // self.micro_train_batch_size // self.world_size

    def load(self, role: Role) -> Policy:
        """The policy of a group, with the initial values of the DeepSpeed loop with ppo.critic: adapter."""
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
        )

    def engine_config(self) -> dict[str, Any]:
        config = super().engine_config()
        config["train_batch_size"] = self.train_batch_size
        config["train_micro_batch_size_per_gpu"] = self.micro_train_batch_size
        config["gradient_accumulation_steps"] = self.accumulated_gradient
        return config

    def _ds_init_train_model(self, model: Any, cfg: dict[str, Any]) -> tuple[Any, Any, Any]:
        """OpenRLHF makes Adam or Muon here; `cfg` has the number of updates."""
        recipe = self.recipe
        module = model.model if isinstance(model, Actor) else model
        policy = module.policy if isinstance(module, PackedCritic) else module
        groups = policy.parameter_groups(recipe.optimizer.value_lr)
        engine = self.wrap(module, groups, recipe.optimizer, recipe.schedule, cfg["scheduler_steps"])
        if isinstance(model, Actor):
            model.model = engine
        else:
            model = engine
        return model, engine.optimizer, engine.lr_scheduler

    def _ds_init_eval_model(self, model: Any) -> Any:
        """A frozen model needs an engine only where ZeRO 3 shards it."""
        if self.stage == 3:
            return super()._ds_init_eval_model(model)
        model.to(self.device)
        return model

    def optimizer_step(self, optimizer: Any, model: Any, scheduler: Any, name: str = "model", **kwargs: Any) -> None:
        """As OpenRLHF's, after a look at the gradients.

        Raises:
            NonFiniteError: on every rank, before the update, if one is not finite.
        """
        engine = model.model if isinstance(model, Actor) else model
        if engine.is_gradient_accumulation_boundary():
            self.before_step(engine)
        engine.step()
