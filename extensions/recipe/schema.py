"""The recipe: everything that a run depends on, typed and checked. The one place where defaults live.

A recipe is one self-contained YAML file; `key.sub=value` on the command line overrides it. Every error is reported at
once, with its key, its value, what is allowed and the nearest valid key, before any model is loaded.

Origins, as named in the descriptions: "paper" with a section; "authors" is the authors' public implementation or the
PPO library that it used (TRL 0.11); "ours" is this project's choice.
"""

from __future__ import annotations

import math
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

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
    backend: Literal["hf", "vllm"] = Field(
        "hf",
        description="what samples: hf is the policy itself; vllm an engine beside each rank, which gets the adapter "
        "anew after every update. With backend: ray it is vllm in any case (ours)",
    )
    response_budget: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)] = Field(
        [12, 32],
        description="most tokens of a response: in training drawn for each row, uniform in [low, high]; in evaluation "
        "high (paper 5.1)",
    )
    temperature: Number = Field(
        1.0, gt=0, description="of the multinomial sampling in training and evaluation (paper 5.1)"
    )

    @property
    def min_new_tokens(self) -> int:
        """Low end of the response budget."""
        return self.response_budget[0]

    @property
    def max_new_tokens(self) -> int:
        """High end of the response budget: the longest response."""
        return self.response_budget[1]


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
    backend: Literal["deepspeed", "ray"] = Field(
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
    vllm: Vllm = Field(default_factory=Vllm, description="of rollout.backend: vllm and backend: ray")
    ray: Ray = Field(default_factory=Ray, description="of backend: ray")
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


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that loads back to the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
