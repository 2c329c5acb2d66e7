"""The recipe: everything that a run depends on, typed and checked. The one place where defaults live.

A recipe is one self-contained YAML file; `key.sub=value` on the command line overrides it. Every error is reported at
once, with its key, its value, what is allowed and the nearest valid key, before any model is loaded.

Origins, as named in the descriptions: "paper" with a section; "authors" is the authors' public implementation or the
PPO library that it used (TRL 0.11); "ours" is this project's choice.
"""

from __future__ import annotations

import copy
import difflib
import itertools
import math
import re
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from extensions.credentials import hidden, without_secrets
from extensions.errors import UserError
from extensions.tasks import SUITES, TASKS, Task, find_task


def _number(value: Any) -> Any:
    # YAML 1.1 reads 1e-5 (no dot) as text; a number is what the user meant.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]


class Section(BaseModel):
    """A part of the recipe; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Model(Section):
    path: str = Field(description="folder or hub name of a decoder-only LLM, or pip:PACKAGE for one inside a package")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the frozen base; auto: bfloat16 on GPU, float32 on CPU (ours)"
    )
    attn_implementation: Literal["auto", "eager", "sdpa"] = Field(
        "auto",
        description="auto: only what packed rows need is computed, where the model allows it; sdpa and eager compute "
        "it all and mask it (MPT) (ours)",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass (ours)")
    load_in_4bit: bool = Field(False, description="4-bit frozen base by bitsandbytes; GPU only (ours)")
    trust_remote_code: bool = Field(
        False, description="run Python code that comes with the model (ours: never by default)"
    )
    adapter: str | None = Field(
        None, description="folder of a PEFT adapter to start training from, or to evaluate; null: a fresh one (ours)"
    )


class Lora(Section):
    rank: int = Field(16, ge=1, description="r of the LoRA matrices (paper 5.1)")
    alpha: int = Field(32, ge=1, description="scaling numerator (authors)")
    dropout: Number = Field(0.05, ge=0, lt=1, description="dropout before the LoRA matrices (authors)")
    rslora: bool = Field(True, description="rank-stabilised scaling alpha / sqrt(r) (authors)")
    target_modules: Literal["auto", "all-linear"] | list[str] = Field(
        "auto",
        description="modules that get LoRA; auto: query and value projections, MPT Wqkv (authors); all-linear: every "
        "linear layer but the head, as in peft",
    )


def _task(value: Any) -> Any:
    return find_task(value) if isinstance(value, str) else value


def _tasks(value: Any) -> Any:
    """`data.tasks=cola,sst2` and `data.tasks=cola` are short for lists; `glue` and `superglue` for all their tasks."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, list):
        return value
    return [task for item in value for task in (SUITES.get(item, [item]) if isinstance(item, str) else [item])]


def _task_to_yaml(task: Task) -> Any:
    return task.name if TASKS.get(task.name) == task else task.model_dump(mode="json", exclude_defaults=True)


RecipeTask = Annotated[Task, BeforeValidator(_task), PlainSerializer(_task_to_yaml)]


class Data(Section):
    tasks: Annotated[list[RecipeTask], BeforeValidator(_tasks)] = Field(
        min_length=1,
        description="names of built-in tasks (glue, superglue: all of them), or your own (extensions/tasks/schema.py)",
    )
    root: str | None = Field(
        None, description="folder of the official download, or hub to download; own files are relative to it"
    )
    max_train_samples: int | None = Field(
        None, ge=1, description="rows of each training set to use, a stratified sample by seed; null: all"
    )
    balanced: bool = Field(
        False, description="spread the labels of each task evenly over the batches, each row still once an epoch (ours)"
    )
    oversample: bool = Field(
        False, description="repeat rows of rare labels until each label of a task has as many as the commonest (ours)"
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none",
        description="weight of a row in SFT's loss and of its reward in PPO; balanced: inverse to its label's share, 1 "
        "on average (scikit-learn's) (ours)",
    )
    mixing: Literal["proportional", "capped", "temperature", "uniform"] = Field(
        "proportional",
        description="share of each task in multi-task training: by its rows, by its rows up to mixing_cap, by its rows "
        "to the power 1 / mixing_temperature, or the same for all (ours; the paper does not say)",
    )
    mixing_cap: int = Field(10000, ge=1, description="most rows of a task in an epoch; capped only (ours)")
    mixing_temperature: Number = Field(
        2.0, ge=1, description="1 is proportional, large is uniform; temperature only (ours)"
    )


GIVEN_TO_TEMPLATE = ("conversation", "messages", "add_generation_prompt", "continue_final_message", "tokenize")


def _template_options(value: Any) -> Any:
    """Names that a template can read, with values that YAML reads back as they are."""
    if not isinstance(value, dict):
        return value
    for name, option in value.items():
        if not isinstance(name, str) or not name.isidentifier() or name.startswith(("return_", "tokenizer_")):
            raise ValueError(f"{name!r} is no name of a template variable")
        if name in GIVEN_TO_TEMPLATE:
            raise ValueError(f"{name!r} is not to be set: the prompt does")
        if not (option is None or isinstance(option, (str, bool, int))) and not (
            isinstance(option, float) and math.isfinite(option)
        ):
            raise ValueError(f"{name!r}: got {option!r}; allowed: text, a number, true, false, null")
    return value


class Prompt(Section):
    chat_template: bool = Field(False, description="use the tokenizer's chat template, not the plain form (paper 4.1)")
    max_tokens: int | None = Field(
        None, ge=16, description="longest prompt in tokens; null: the model's context less the response budget (ours)"
    )
    shots: int = Field(
        0, ge=0, description="demonstrations from the training set before each query; few-shot prompting: 5 (paper 5.2)"
    )
    demonstrations: Literal["balanced", "random"] = Field(
        "balanced", description="how they are drawn, by seed: labels in turn, or any rows (ours)"
    )
    template_options: Annotated[dict[str, Any], BeforeValidator(_template_options)] = Field(
        {},
        description="variables for the chat template, such as reasoning_effort: low; enable_thinking is false where it "
        "is not here (ours)",
    )


class Rollout(Section):
    engine: Literal["hf", "vllm"] = Field(
        "hf",
        description="what samples: hf is the policy itself; vllm an engine beside each rank, which gets the adapter "
        "anew after every update. With engine: ray it is vllm in any case (ours)",
    )
    min_new_tokens: int = Field(12, ge=1, description="low end of the response budget, in tokens (paper 5.1)")
    max_new_tokens: int = Field(
        32, ge=1, description="high end of the budget, drawn for each row; evaluation uses it for all (paper 5.1)"
    )
    temperature: Number = Field(
        1.0, gt=0, description="of the multinomial sampling in training and evaluation (paper 5.1)"
    )


class Vllm(Section):
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share an engine's weights; Ray only (ours)")
    gpu_memory_utilization: Number = Field(
        0.3, gt=0, le=1, description="share of a GPU's memory that an engine takes, its weights included (ours)"
    )
    enforce_eager: bool = Field(False, description="no CUDA graphs; on a CPU there are none in any case (ours)")
    sleep: bool = Field(
        True, description="leave the GPU's memory to the training between rollouts, where they share it (ours)"
    )
    probe_samples: int = Field(
        4, ge=1, description="training rows whose logprobs by engine and trainer are compared after each sync (ours)"
    )
    probe_tolerance: Number | None = Field(
        None,
        gt=0,
        description="mean difference of these logprobs, in nats, beyond which the run stops; null: 0.001 in float32, "
        "0.1 in bfloat16 (ours)",
    )


class Ray(Section):
    address: str | None = Field(
        None, description="of a running Ray cluster (auto, HOST:PORT, ray://...); null: RAY_ADDRESS, else one here"
    )
    num_nodes: int = Field(1, ge=1, description="nodes of each group: actor, critic, reference (ours)")
    gpus_per_node: int | None = Field(
        None, ge=1, description="ranks of each group on a node; null: the node's GPUs, or 1 on a CPU (ours)"
    )
    colocate: bool = Field(
        True, description="all groups and engines share the same GPUs in turns; false: each has its own (ours)"
    )
    num_engines: int | None = Field(
        None, ge=1, description="vLLM engines; null: as many as the actor's GPUs hold, which colocate needs (ours)"
    )


class Sft(Section):
    batch_size: int = Field(24, ge=1, description="samples of one optimizer step over all ranks (paper 5.1)")
    max_steps: int | None = Field(
        None, ge=1, description="optimizer steps; null: as many samples as PPO sees, max_steps x ppo.batch_size (ours)"
    )
    micro_batch_size: int = Field(
        24, ge=1, description="rows of one packed forward on a rank; memory against speed (ours)"
    )
    loss: Literal["sequence", "answer"] = Field(
        "sequence", description="tokens that the next-token loss is over: prompt and answer, or answer only (paper 4.2)"
    )
    optimizer: Literal["adamw", "adafactor"] = Field("adamw", description="AdamW for SFT (paper 5.1)")
    lr: Number | None = Field(None, gt=0, description="peak learning rate; null: optimizer.lr, the same (paper 5.1)")
    max_grad_norm: Number = Field(1.0, ge=0, description="gradient clipping; 0: off (ours, OpenRLHF's default)")


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
        None, ge=16, description="longest input in tokens, the long text is cut; null: what the model can read (ours)"
    )
    intermediate: RecipeTask | None = Field(
        None, description="task to fine-tune on first, as BERT-large++ does on MNLI (paper 5.4, STILTs); null: none"
    )
    intermediate_for: list[str] = Field(
        ["cb", "superglue_rte", "boolq"],
        description="tasks that start from its encoder, with a fresh head; the others do not (paper 5.4)",
    )


class Kl(Section):
    init: Number = Field(0.2, ge=0, description="coefficient of the per-token KL penalty at the start (authors)")
    adaptive: bool = Field(True, description="steer the coefficient towards the target (authors)")
    target: Number = Field(6.0, gt=0, description="KL of a response, in nats, that the controller aims for (authors)")
    horizon: Number = Field(
        10000.0, gt=0, description="samples over which the coefficient adapts; larger is slower (authors)"
    )
    reference: Literal["start", "base"] = Field(
        "start",
        description="what the penalty keeps the policy near: itself before training (model.adapter if given, as TRL's "
        "copy of the model), or the base model (authors; differs only with model.adapter)",
    )


class Ppo(Section):
    batch_size: int = Field(
        16, ge=1, description="samples of one iteration over all ranks; from 4, 8, 12, 16 (paper 5.1)"
    )
    epochs: int = Field(4, ge=1, description="passes over each batch (paper 5.1)")
    mini_batch_size: int | None = Field(
        None, ge=1, description="samples of an optimizer step; null: the batch (paper 5.1)"
    )
    micro_batch_size: int = Field(
        16, ge=1, description="rows of one packed forward on a rank; memory against speed (ours)"
    )
    clip: Number = Field(0.2, gt=0, description="clip range of the policy ratio (authors)")
    gamma: Number = Field(1.0, ge=0, le=1, description="discount (authors)")
    lam: Number = Field(0.95, ge=0, le=1, description="lambda of GAE (authors)")
    whiten: bool = Field(True, description="advantages to zero mean and unit variance over the batch (authors)")
    whiten_min_std: Number = Field(
        0.0, ge=0, description="least deviation that whitening divides by, in units of the reward; 0: none (authors)"
    )
    entropy_coef: Number = Field(0.0, ge=0, description="weight of an entropy bonus, in nats a token (ours: off)")
    value_coef: Number = Field(0.1, ge=0, description="weight of the value loss (authors)")
    value_clip: Number | None = Field(0.2, gt=0, description="clip range of the values; null: no clipping (authors)")
    value_target: Literal["gae", "td"] = Field(
        "gae", description="gae: GAE returns (authors); td: equation (1) (paper 3)"
    )
    critic: Literal["shared", "adapter"] = Field(
        "shared",
        description="value head on the policy's trunk (paper 3), or with its own adapter on the same base (ours)",
    )
    old_logprobs: Literal["auto", "sampled", "recomputed"] = Field(
        "auto",
        description="auto: those of sampling in float32, a second forward in bfloat16, where they differ (ours)",
    )
    max_grad_norm: Number = Field(1.0, ge=0, description="gradient clipping; 0: off (ours, OpenRLHF's default)")
    kl: Kl = Field(default_factory=Kl, description="penalty for leaving the reference model")


class Optimizer(Section):
    name: Literal["adafactor", "adamw"] = Field("adafactor", description="Adafactor for PPO (paper 5.1)")
    lr: Number = Field(9e-6, gt=0, description="peak learning rate (paper 5.1)")
    value_lr: Number | None = Field(None, gt=0, description="learning rate of the value head; null: lr (ours)")
    weight_decay: Number = Field(0.0, ge=0, description="decoupled weight decay (authors)")
    betas: list[Number] = Field([0.9, 0.999], min_length=2, max_length=2, description="of AdamW (PyTorch's defaults)")
    eps: Number = Field(1e-8, gt=0, description="of AdamW (PyTorch's default)")


class Schedule(Section):
    name: Literal["cosine", "linear", "constant"] = Field("cosine", description="shape after the warmup (paper 5.1)")
    warmup_ratio: Number = Field(0.1, ge=0, le=1, description="share of the optimizer steps (paper 5.1)")
    min_lr_ratio: Number = Field(0.1, ge=0, le=1, description="final over peak learning rate; cosine only (paper 5.1)")


class DeepSpeed(Section):
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="ZeRO stage; LoRA state is tiny, 3 shards the base (ours)")
    offload: bool = Field(False, description="optimizer state, and under ZeRO 3 the base, in CPU memory (ours)")
    config: str | None = Field(None, description="your own DeepSpeed JSON, merged over the one made here")
    timeout: Number = Field(
        600, gt=0, description="seconds without progress after which a rank counts as hung and the run ends (ours)"
    )


class Evaluation(Section):
    split: Literal["auto", "validation", "test"] = Field(
        "auto", description="split of the before/after table; auto: test where it has labels, else validation (ours)"
    )
    max_samples: int | None = Field(None, ge=1, description="rows a task for the table, spread evenly; null: all")
    batch_size: int = Field(
        64, ge=1, description="rows sampled together on a rank; fewer where a cache of long prompts is too large (ours)"
    )
    micro_batch_size: int = Field(
        64, ge=1, description="rows of one packed forward over prompts; memory against speed (ours)"
    )
    decoding: Literal["sample", "greedy", "likelihood"] = Field(
        "sample",
        description="sample: one multinomial response (paper 5.1); greedy: the most probable tokens; likelihood: the "
        "most probable of the task's answers (ours)",
    )
    before: bool = Field(True, description="also evaluate before training (ours)")
    predict_test: bool = Field(False, description="after training answer the test splits too, for nlu submit (ours)")
    every_steps: int = Field(0, ge=0, description="iterations between validations; 0: none (ours)")
    validation_samples: int | None = Field(200, ge=1, description="rows a task for each validation; null: all (ours)")
    patience: int = Field(
        0, ge=0, description="validations without a new best before training stops, best kept; 0: never (paper 5.1)"
    )


class Logging(Section):
    tensorboard: bool = Field(True, description="event files in the run folder")
    wandb: bool = Field(False, description="Weights & Biases; needs the extra `track`")
    trackio: bool = Field(False, description="Trackio; needs the extra `track`")
    rollout_samples: int = Field(4, ge=0, description="responses a step in rollouts.jsonl; 0: none")


class Checkpoint(Section):
    every_steps: int = Field(
        50,
        ge=0,
        description="iterations between checkpoints; also before the first, after the last and at a new best "
        "validation. 0: only when the run is told to stop (ours)",
    )
    keep: int = Field(2, ge=1, description="newest checkpoints to keep, besides that of the best validation (ours)")
    on_error: Literal["warn", "stop"] = Field(
        "warn", description="when a full disk refuses a checkpoint or a record: go on and say so, or stop (ours)"
    )


# What a run that is resumed may have otherwise than before: none of it changes a bit of the result.
MAY_CHANGE = (
    "output_dir",
    "checkpoint",
    "deepspeed.timeout",
    "data.root",  # the rows must be the same: they are hashed
    "logging.tensorboard",
    "logging.wandb",
    "logging.trackio",
)


class Recipe(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$", description="of the run: letters, digits, . _ -")
    method: Literal["ppo", "sft", "eval", "encoder"] = Field(
        "ppo", description="what the run does; set by the script of launch/ that starts it"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of everything random")
    engine: Literal["deepspeed", "ray"] = Field(
        "deepspeed",
        description="what trains by PPO: DeepSpeed ranks around one shared base, or OpenRLHF's trainer on Ray and vLLM "
        "(launch/ppo_ray.sh) (ours)",
    )
    output_dir: str | None = Field(
        None, description="run folder, exactly there; null: runs/NAME, with -sft, -zero-shot, ... for other than PPO"
    )
    max_steps: int = Field(1000, ge=1, description="PPO iterations: each samples and learns from one batch")
    max_epochs: Number | None = Field(
        None,
        gt=0,
        description="passes over the training rows after which training ends, if sooner; null: none (ours)",
    )
    model: Model = Field(description="the LLM")
    lora: Lora = Field(default_factory=Lora, description="the trained layers (paper 4.4)")
    data: Data = Field(description="tasks and files")
    prompt: Prompt = Field(default_factory=Prompt, description="paper 4.1")
    rollout: Rollout = Field(default_factory=Rollout, description="paper 5.1")
    reward: str = Field(
        "nlu", description="file in reward_fns/ by name, or path/to/my_reward.py with reward(text, label)"
    )
    ppo: Ppo = Field(default_factory=Ppo, description="paper 4.3")
    optimizer: Optimizer = Field(default_factory=Optimizer, description="of PPO; SFT's differs as sft says (paper 5.1)")
    schedule: Schedule = Field(default_factory=Schedule, description="paper 5.1")
    sft: Sft = Field(default_factory=Sft, description="paper 4.2")
    encoder: Encoder = Field(default_factory=Encoder, description="paper 5.2")
    deepspeed: DeepSpeed = Field(default_factory=DeepSpeed, description="the training engine")
    vllm: Vllm = Field(default_factory=Vllm, description="of rollout.engine: vllm and engine: ray")
    ray: Ray = Field(default_factory=Ray, description="of engine: ray")
    evaluation: Evaluation = Field(default_factory=Evaluation, description="validation and the before/after table")
    logging: Logging = Field(
        default_factory=Logging, description="records and trackers; metrics.jsonl is always written"
    )
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="resume points")

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) if self.output_dir is not None else Path("runs") / f"{self.name}{self._suffix}"

    @property
    def _suffix(self) -> str:
        """What keeps the runs of one recipe by several methods apart."""
        if self.method != "eval":
            return "" if self.method == "ppo" else f"-{self.method}"
        shots = f"-{self.prompt.shots}-shot" if self.prompt.shots else "-zero-shot"
        if self.model.adapter is not None:
            shots = f"-eval-{adapter_name(self.model.adapter)}{shots.removesuffix('-zero-shot')}"
        return shots if self.evaluation.decoding == "sample" else f"{shots}-{self.evaluation.decoding}"

    @property
    def trained_with(self) -> Optimizer:
        """The optimizer of the method."""
        if self.method != "sft":
            return self.optimizer
        return self.optimizer.model_copy(update={"name": self.sft.optimizer, "lr": self.sft.lr or self.optimizer.lr})

    def training_steps(self, rows: int | None = None) -> int:
        """Optimizer steps of SFT, iterations of PPO: at most; fewer where `max_epochs` of so many training rows are."""
        steps = self.max_steps
        if self.method == "sft":
            steps = self.sft.max_steps or max(1, round(steps * self.ppo.batch_size / self.sft.batch_size))
        if rows is not None and self.max_epochs is not None:
            steps = min(steps, math.ceil(self.max_epochs * rows / self.training_batch))
        return steps

    @property
    def training_batch(self) -> int:
        """Samples of one of these, over all ranks."""
        return self.sft.batch_size if self.method == "sft" else self.ppo.batch_size

    @model_validator(mode="after")
    def _contradictions(self) -> Recipe:
        errors = contradictions(self)
        if errors:
            raise ValueError("\n".join(errors))
        return self


def contradictions(recipe: Recipe) -> list[str]:
    """Keys that are each allowed but do not go together; one sentence each, naming the keys."""
    errors = []
    ppo, rollout, names = recipe.ppo, recipe.rollout, [task.name for task in recipe.data.tasks]
    key = {"ppo": "optimizer.name", "sft": "sft.optimizer"}.get(recipe.method)
    if key and recipe.trained_with.name == "adafactor" and recipe.deepspeed.zero_stage > 0:
        errors.append(
            f"deepspeed.zero_stage: {recipe.deepspeed.zero_stage} does not go with {key}: adafactor. ZeRO "
            "flattens parameters into partitions, so Adafactor loses its row and column factors and silently becomes "
            f"another optimizer. Use zero_stage: 0 (LoRA state is tiny), or {key}: adamw"
        )
    if recipe.deepspeed.offload and recipe.deepspeed.zero_stage == 0:
        errors.append("deepspeed.offload: true needs deepspeed.zero_stage: 1, 2 or 3; at stage 0 nothing is offloaded")
    if rollout.min_new_tokens > rollout.max_new_tokens:
        errors.append(
            f"rollout.min_new_tokens: {rollout.min_new_tokens} is above max_new_tokens: {rollout.max_new_tokens}"
        )
    if ppo.mini_batch_size is not None and ppo.batch_size % ppo.mini_batch_size:
        errors.append(f"ppo.mini_batch_size: {ppo.mini_batch_size} does not divide ppo.batch_size: {ppo.batch_size}")
    if recipe.evaluation.patience and not recipe.evaluation.every_steps:
        errors.append("evaluation.patience needs evaluation.every_steps: without validations nothing can stop early")
    if recipe.engine == "ray" and recipe.method != "ppo":
        errors.append(f"engine: ray trains by PPO alone; leave engine out for method: {recipe.method}")
    if rollout.engine == "vllm" and recipe.engine == "deepspeed":
        if ppo.old_logprobs == "sampled":
            errors.append(
                "ppo.old_logprobs: sampled does not go with rollout.engine: vllm, whose logprobs are rounded otherwise "
                "than the trainer's and which knows no values; use auto"
            )
        if recipe.vllm.tensor_parallel_size > 1:
            errors.append(
                f"vllm.tensor_parallel_size: {recipe.vllm.tensor_parallel_size} needs engine: ray; under DeepSpeed "
                "each rank has an engine of its own"
            )
    errors += _of_labels(recipe)
    if recipe.prompt.template_options and not recipe.prompt.chat_template:
        errors.append("prompt.template_options needs prompt.chat_template: true; the plain form has no template")
    for name in sorted({name for name in names if names.count(name) > 1}):
        errors.append(f"data.tasks: {name!r} is named twice")
    for name in recipe.encoder.intermediate_for:
        if name not in TASKS and name not in names:
            errors.append(f"encoder.intermediate_for: {name!r} is neither a built-in task nor one of data.tasks")
    return errors


def _of_labels(recipe: Recipe) -> list[str]:
    """What does not fit the labels of the tasks."""
    errors, data = [], recipe.data
    used = ["data.oversample: true"] * data.oversample
    used += [f"data.class_weights: {data.class_weights}"] * (data.class_weights != "none")
    if len(used) == 2:
        errors.append(f"{used[0]} and {used[1]} would balance the labels twice; use one of them")
    for key in used:
        if recipe.method == "encoder":
            errors.append(f"{key} is of method sft and ppo; an encoder does not take it: leave it out")
        for task in data.tasks:
            if task.kind != "classification":
                errors.append(
                    f"{key}: {task.name} is a {task.kind} task, whose rows have no classes to balance; leave the key "
                    "out, or the task"
                )
    if recipe.method == "encoder":
        errors += [
            f"data.tasks: {task.name} has several labels a row, which an encoder here does not learn; use ppo or sft"
            for task in (*data.tasks, *filter(None, [recipe.encoder.intermediate]))
            if task.multi_label
        ]
    return errors


# ------------------------------------------------------------------------------------------------------- loading


DEEPEST = 20  # parts of a key; no recipe has as many
MOST_VALUES = 100_000  # of a recipe, aliases written out: some lines of them can stand for billions
NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # YAML can spell it, no file name and no UTF-8 can hold it


class _Loader(yaml.SafeLoader):
    """safe_load that refuses a key given twice, of which PyYAML keeps the last one silently, and what is no value."""

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _count_values(node, {})
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            raise _invalid(node, f"{str(node.value)[:40]!r} is not of the type {kind} ({error})") from error
        if isinstance(value, int) and abs(value) >= 2**63:
            raise _invalid(node, "a whole number of more than 64 bits")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise _invalid(key, f"key {key.value!r} is given twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _invalid(node: yaml.Node, what: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark)


def _count_values(node: yaml.Node, counts: dict[int, int | None]) -> int:
    """Values in and below a node, aliases written out.

    Args:
        counts: of the nodes seen before, by id; None while one is being counted.
    """
    if id(node) in counts:
        known = counts[id(node)]
        if known is None:
            raise _invalid(node, "an alias leads back to where it stands")
        return known
    counts[id(node)] = None
    inner = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        inner = itertools.chain.from_iterable(node.value)
    elif isinstance(node, yaml.ScalarNode) and NOT_TEXT.search(node.value):
        raise _invalid(node, f"{node.value[:40]!r} holds NUL or half of a surrogate pair, which is not text")
    count = 1 + sum(_count_values(one, counts) for one in inner)
    if count > MOST_VALUES:
        raise _invalid(node, f"more than {MOST_VALUES} values, aliases written out")
    counts[id(node)] = count
    return count


def load_recipe(path: str | Path, overrides: Sequence[str] = (), method: str | None = None) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: the YAML file.
        overrides: `key.sub=value` strings; values are YAML.
        method: what a launch script does; None leaves it to the recipe.

    Raises:
        UserError: with every error in it, one a line; or the recipe names another method. What looks like an access
            token is an error, and is never shown.
    """
    try:
        return _load(path, overrides, method)
    except UserError as error:
        message = hidden(str(error))
    raise UserError(message)  # out of the handler: the errors behind it show what is hidden


def _load(path: str | Path, overrides: Sequence[str], method: str | None) -> Recipe:
    raw, lines = _read_yaml(Path(path))
    for override in overrides:
        _apply(raw, override)
    if method is not None and raw.setdefault("method", method) != method:
        raise UserError(
            f"{path}: method: {raw['method']!r} in the recipe, but launch/{method}.sh was started; run "
            f"launch/{raw['method']}.sh, or leave method out: the script sets it"
        )
    errors, recipe = _check(raw)
    if recipe is None:
        shown = [f"  {lines.get(key.split('[')[0], '') or ''}{message}" for key, message in errors]
        count = f"{len(errors)} error{'s' if len(errors) > 1 else ''}"
        raise UserError(f"{path}: {count} in the recipe\n" + "\n".join(shown))
    return recipe


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The mapping in a file, and "line N: " of each dotted key."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe; recipes of the project are in recipes/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    try:
        loader = _Loader(text)
        loader.name = str(path)
        node = loader.get_single_node()
        raw = loader.construct_document(node) if node is not None else None
        lines = dict(_key_lines(node, "", set()))
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {_problem(error, text)}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected keys and values (name:, model:, data:), got {type(raw).__name__}")
    return raw, lines


def _problem(error: Exception, text: str) -> str:
    """What is wrong in a YAML text, in one line. Where it holds a token, which YAML might show in part: only where."""
    if hidden(text) == text:
        return " ".join(str(error).split())
    mark = getattr(error, "problem_mark", None)
    place = "" if mark is None else f" in line {mark.line + 1}"
    return f"what is wrong{place} is not shown, since the text holds an access token; take that out first"


def _key_lines(node: yaml.Node | None, prefix: str, seen: set[int]) -> list[tuple[str, str]]:
    found = []
    if isinstance(node, yaml.MappingNode) and id(node) not in seen:  # an alias leads to a node seen before
        seen.add(id(node))
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            found.append((name, f"line {key.start_mark.line + 1}: "))
            found += _key_lines(value, f"{name}.", seen)
    return found


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {hidden(override)!r}: expected key.sub=value, for example ppo.batch_size=8")
    try:
        value = yaml.load(text, _Loader) if text else None  # nosec B506 # a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(
            f"override {hidden(override)!r}: the value is not valid YAML ({_problem(error, override)})"
        ) from error
    *parents, last = key.strip().split(".")
    if len(parents) > DEEPEST:
        raise UserError(f"override {hidden(override)[:80]!r}: no key has so many parts")
    place = raw
    for parent in parents:
        if isinstance(place, dict) and place.get(parent) is None:
            place[parent] = {}
        place = place[parent] if isinstance(place, dict) else None
    if not isinstance(place, dict):
        raise UserError(f"override {hidden(override)!r}: {'.'.join(parents)} holds a value, not keys")
    place[last] = value


def _check(raw: dict[str, Any]) -> tuple[list[tuple[str, str]], Recipe | None]:
    """Every error of a recipe at once: (key, message).

    Cross-key rules can only be checked on a recipe whose single keys are right, so wrong keys are dropped and the
    rest is checked again.
    """
    raw, errors = without_secrets(raw)
    secret = {key for key, _ in errors}  # reported once
    try:
        recipe = Recipe.model_validate(raw)
        return errors, recipe if not errors else None
    except ValidationError as error:
        for item in error.errors():
            if not item["loc"]:  # contradictions: one a line
                errors += [("", message) for message in str(item["msg"]).removeprefix("Value error, ").split("\n")]
            elif _dotted(item["loc"]) not in secret:
                errors.append((_dotted(item["loc"]), _message(item, raw)))
        places = [tuple(item["loc"]) for item in error.errors() if item["loc"]]
    if places:
        try:
            Recipe.model_validate(_without(raw, places))
        except ValidationError as error:
            for item in error.errors():
                if not item["loc"]:
                    errors += [("", message) for message in str(item["msg"]).removeprefix("Value error, ").split("\n")]
    return errors, None


def _without(raw: Any, places: list[tuple[int | str, ...]]) -> Any:
    """`raw` less the values at `places` (a wrong list item takes its list along), required keys filled in."""
    repaired = copy.deepcopy(raw)
    for place in places:
        keys = list(itertools.takewhile(lambda step: isinstance(step, str), place))
        if not keys:
            continue
        at = repaired
        for step in keys[:-1]:
            at = at.get(step) if isinstance(at, dict) else None
        if isinstance(at, dict):
            at.pop(keys[-1], None)
    repaired = {key: value for key, value in repaired.items() if isinstance(key, str)}
    for key, filler in (("name", "x"), ("model", {"path": "x"}), ("data", {"tasks": ["cola"]})):
        repaired.setdefault(key, filler)
        if isinstance(filler, dict) and isinstance(repaired[key], dict):
            for sub, value in filler.items():
                repaired[key].setdefault(sub, value)
    return repaired


def _dotted(place: tuple[int | str, ...]) -> str:
    text = ""
    for step in place:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def _message(item: Any, raw: dict[str, Any]) -> str:
    key = _dotted(item["loc"])
    kind = item["type"]
    if kind == "extra_forbidden":
        allowed = _keys_at(item["loc"][:-1])
        name = str(item["loc"][-1])
        near = _elsewhere(name) or difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        return f"{key}: unknown key{hint} Allowed here: {', '.join(allowed)}"
    if kind == "missing":
        return f"{key}: missing; it has no default"
    text = str(item["msg"]).removeprefix("Value error, ")
    if isinstance(item["input"], (dict, list)) and kind == "value_error":
        return f"{key}: {text}"
    value = repr(item["input"])
    return f"{key}: got {value if len(value) < 80 else value[:77] + '...'}; {text[0].lower() + text[1:]}"


def _keys_at(place: tuple[int | str, ...]) -> list[str]:
    """Valid keys of the section at `place`."""
    section: Any = Recipe
    for step in place:
        if isinstance(step, int):
            section = Task
            continue
        field = section.model_fields.get(step) if isinstance(section, type) and issubclass(section, BaseModel) else None
        if field is None:
            return []
        candidates = [field.annotation, *get_args(field.annotation)]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), section)
    return list(section.model_fields)


def all_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a recipe and its pydantic field."""
    keys: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            keys |= all_keys(annotation, f"{prefix}{name}.")
        else:
            keys[f"{prefix}{name}"] = field
    return keys


def value_at(recipe: Recipe, key: str) -> Any:
    """The value of a dotted key."""
    return reduce(getattr, key.split("."), recipe)


def adapter_name(path: str) -> str:
    """What an adapter is called: its folder, or that of its run where it has the name that all runs give it."""
    folder = Path(path)
    return folder.parent.name or folder.name if folder.name == "adapter" else folder.name


def _elsewhere(name: str) -> list[str]:
    """Full names of keys elsewhere in the recipe that end as the unknown one does; `name` itself is no help."""
    return [key for key in all_keys() if key.rpartition(".")[2] == name and name not in ("name", "path")]


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that loads back to the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
