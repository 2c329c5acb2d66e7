"""The sections of a recipe that say how a method trains: PPO, SFT, encoders, optimizer and schedule."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainSerializer

from extensions.recipe.sections import Number, RecipeTask, Section
from extensions.tasks import GRID_POINTS

ClipRange = Annotated[
    list[Annotated[Number, Field(gt=0)]],
    BeforeValidator(lambda value: value if isinstance(value, list) else [value]),
    PlainSerializer(lambda sides: sides[0] if len(sides) == 1 else sides),
    Field(min_length=1, max_length=2),
]

# OpenRLHF's names. Those of GROUPED compare the responses to one prompt; those of WHITENED can be whitened.
AdvantageEstimator = Literal["gae", "rloo", "reinforce_baseline", "group_norm", "dr_grpo", "reinforce"]
GROUPED = ("rloo", "reinforce_baseline", "group_norm", "dr_grpo")
WHITENED = ("gae", "reinforce", "reinforce_baseline")


class Kl(Section):
    init: Number = Field(0.2, ge=0, description="coefficient of the per-token KL penalty at the start (authors)")
    adaptive: bool = Field(True, description="steer the coefficient towards the target (authors)")
    target: Number = Field(6.0, gt=0, description="KL of a response, in nats, that the controller aims for (authors)")
    horizon: Number = Field(
        10000.0, gt=0, description="samples over which the coefficient adapts; larger is slower (authors)"
    )
    reference: Literal["start", "base"] = Field(
        "start",
        description="the reference model: the policy before training (with model.adapter if given, as TRL's copy of "
        "the model), or the base model (authors; differs only with model.adapter)",
    )
    use_loss: bool = Field(
        False, description="the KL is a term of the policy loss (GRPO); false: a penalty in the reward (authors)"
    )
    estimator: Literal["k1", "k2", "k3"] = Field(
        "k1",
        description="KL estimate of a token as a loss (Schulman). k1: the log ratio, with the importance-weighted "
        "gradient of the KL; k2: half its square; k3: GRPO's, never negative. A penalty is always k1 (OpenRLHF)",
    )


class Ppo(Section):
    batch_size: int = Field(
        16, ge=1, description="prompts of one iteration over all ranks; from 4, 8, 12, 16 (paper 5.1)"
    )
    samples_per_prompt: int = Field(
        1, ge=1, description="responses to each prompt; its tokens are computed once for all of them (paper 5.1: 1)"
    )
    epochs: int = Field(4, ge=1, description="passes over each batch (paper 5.1)")
    mini_batch_size: int | None = Field(
        None, ge=1, description="prompts per optimizer step, with all their responses; null: the batch (paper 5.1)"
    )
    micro_batch_size: int = Field(
        16,
        ge=1,
        description="prompts of one packed forward on a rank, with all their responses; memory against speed (ours)",
    )
    advantage_estimator: AdvantageEstimator = Field(
        "gae",
        description="gae: with the critic (paper 3); the others have none: rloo, reinforce_baseline, group_norm (GRPO) "
        "and dr_grpo compare the responses to a prompt, reinforce does not (OpenRLHF)",
    )
    drop_equal_groups: bool = Field(
        False, description="leave prompts whose responses all have the same reward out of the update (ours)"
    )
    resample_equal_groups: int = Field(
        0, ge=0, description="times that such prompts are sampled again until their rewards differ; 0: never (ours)"
    )
    clip: ClipRange = Field(
        [0.2],
        description="clip range of the policy ratio (authors), or its two sides, [low, high] (DAPO: [0.2, 0.28])",
    )
    gamma: Number = Field(1.0, ge=0, le=1, description="discount (authors)")
    lam: Number = Field(0.95, ge=0, le=1, description="lambda of GAE (authors)")
    whiten: bool = Field(
        True,
        description="advantages to zero mean and unit variance over the batch (authors); of gae, reinforce and "
        "reinforce_baseline only (OpenRLHF)",
    )
    whiten_min_std: Number = Field(
        0.0,
        ge=0,
        description="floor of the standard deviation in whitening, in units of the reward; 0: none (authors)",
    )
    entropy_coef: Number = Field(0.0, ge=0, description="weight of an entropy bonus, in nats per token (ours: off)")
    value_coef: Number = Field(0.1, ge=0, description="weight of the value loss (authors)")
    value_clip: Number | None = Field(0.2, gt=0, description="clip range of the values; null: no clipping (authors)")
    value_target: Literal["gae", "td"] = Field(
        "gae", description="gae: GAE returns (authors); td: equation (1) (paper 3)"
    )
    critic: Literal["shared", "adapter"] = Field(
        "shared",
        description="value head on the policy's trunk (paper 3), or with its own adapter on the same base (ours); gae "
        "only",
    )
    critic_from: str = Field(
        "auto",
        description="critic to start from. auto: that of the PPO run of model.adapter (critic/ beside it), if it has "
        "one of this kind; none: a new value head; or the folder critic/ of a PPO run (ours)",
    )
    old_logprobs: Literal["auto", "sampled", "recomputed"] = Field(
        "auto",
        description="auto: sampled in float32; recomputed by a second forward in bfloat16, where the two differ (ours)",
    )
    max_grad_norm: Number = Field(1.0, ge=0, description="gradient clipping; 0: off (ours, OpenRLHF's default)")
    kl: Kl = Field(default_factory=Kl, description="penalty for deviating from the reference model")

    @property
    def value_model(self) -> Literal["shared", "adapter", "none"]:
        """The critic that the advantage estimator needs."""
        return self.critic if self.advantage_estimator == "gae" else "none"

    @property
    def clip_range(self) -> tuple[float, float]:
        """Clip range of the policy ratio below and above 1."""
        return self.clip[0], self.clip[-1]

    @property
    def whitens(self) -> bool:
        """Whether advantages are whitened."""
        return self.whiten and self.advantage_estimator in WHITENED


class Sft(Section):
    batch_size: int = Field(24, ge=1, description="samples of one optimizer step over all ranks (paper 5.1)")
    max_steps: int | None = Field(
        None, ge=1, description="optimizer steps; null: as many samples as PPO sees, max_steps x ppo.batch_size (ours)"
    )
    micro_batch_size: int = Field(
        24,
        ge=1,
        description="rows of one packed forward on a rank, with all their answers in loss: correlation; memory against "
        "speed (ours)",
    )
    loss: Literal["sequence", "answer", "correlation"] = Field(
        "answer",
        description="next-token loss over answer: the answer and its closing tag, the stronger baseline (ours), or "
        "sequence: the prompt too (paper 4.2). correlation: for regressions, of the mean score with the gold score in "
        "the batch; answers by likelihood only (ours)",
    )
    optimizer: Literal["adamw", "adafactor"] = Field("adamw", description="AdamW for SFT (paper 5.1)")
    lr: Number | None = Field(None, gt=0, description="peak learning rate; null: optimizer.lr, the same (paper 5.1)")
    max_grad_norm: Number = Field(1.0, ge=0, description="gradient clipping; 0: off (ours, OpenRLHF's default)")

    @property
    def samples_per_example(self) -> int:
        """Prompt with answer: the gold answer, or every score of the task's grid."""
        return GRID_POINTS if self.loss == "correlation" else 1


class Encoder(Section):
    epochs: int = Field(
        3, ge=1, description="passes over the training set, from 2, 3, 4; the best by validation is kept (BERT A.3)"
    )
    batch_size: int = Field(32, ge=1, description="samples of one optimizer step over all ranks; 16 or 32 (BERT A.3)")
    lr: Number = Field(
        2e-5, gt=0, description="peak learning rate of AdamW, then linear decay; 2e-5 to 5e-5 (BERT A.3)"
    )
    warmup_ratio: Number = Field(0.1, ge=0, lt=1, description="share of the optimizer steps (BERT's published code)")
    weight_decay: Number = Field(0.01, ge=0, description="decoupled weight decay (BERT A.2)")
    max_tokens: int | None = Field(
        None, ge=16, description="longest input in tokens, the long text is cut; null: the model's limit (ours)"
    )
    intermediate: RecipeTask | None = Field(
        None, description="task to fine-tune on first, as BERT-large++ does on MNLI (paper 5.4, STILTs); null: none"
    )
    intermediate_for: list[str] = Field(
        ["cb", "superglue_rte", "boolq"],
        description="tasks that start from its encoder, with a new head; the others do not (paper 5.4)",
    )


class Optimizer(Section):
    name: Literal["adafactor", "adamw"] = Field("adafactor", description="Adafactor for PPO (paper 5.1)")
    lr: Number = Field(9e-6, gt=0, description="peak learning rate (paper 5.1)")
    value_lr: Number | None = Field(None, gt=0, description="learning rate of the value head; null: lr (ours)")
    weight_decay: Number = Field(0.0, ge=0, description="decoupled weight decay (authors)")
    betas: list[Number] = Field([0.9, 0.999], min_length=2, max_length=2, description="of AdamW (PyTorch's defaults)")
    eps: Number = Field(1e-8, gt=0, description="of AdamW (PyTorch's default)")


class Schedule(Section):
    name: Literal["cosine", "linear", "constant"] = Field("cosine", description="shape after the warmup (paper 5.1)")
    warmup_ratio: Number = Field(0.1, ge=0, le=1, description="share of the schedule's optimizer steps (paper 5.1)")
    min_lr_ratio: Number = Field(0.1, ge=0, le=1, description="final over peak learning rate; cosine only (paper 5.1)")
    epochs: Number | None = Field(
        None,
        gt=0,
        description="epochs of the training rows that warmup and decay span, however long the run may be; after them "
        "the rate stays at its minimum (ours). null: the run at its longest (paper 5.1)",
    )

    def warmup_updates(self, num_updates: int) -> int:
        """Optimizer steps of the warmup in a schedule of `num_updates`."""
        return math.ceil(num_updates * self.warmup_ratio)
