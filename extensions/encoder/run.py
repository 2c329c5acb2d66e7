"""Encoder baselines (section 5.2 of the paper): BERT, fine-tuned on the same tasks, rows and metrics as the LLM.

Training is transformers' own `Trainer`. Each task that has training rows gets a model of its own; tasks that are only
evaluated (MNLI-mm, AX, AX-b, AX-g) are answered by the model of the task that teaches them. BERT-large++ is fine-tuned
on an intermediate task first (section 5.4; STILTs, Phang et al. 2018).

Besides what all runs leave, the run folder has:

models/TASK        fine-tuned model and tokenizer
tasks/TASK.json    what is finished: scores, epochs; a run that stopped goes on with the others
checkpoints/TASK   the Trainer's own, of the task in work
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError  # nosec B403 # only the error of one
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.tokenization_utils_base import BatchEncoding, PreTrainedTokenizerBase

from extensions.common.console import Reporter
from extensions.common.errors import UserError
from extensions.common.files import read_json, read_jsonl, write_json, write_jsonl
from extensions.data import (
    Example,
    check_trainable,
    has_split,
    is_labelled,
    load_examples,
    load_training,
    subsample_evenly,
)
from extensions.data.splits import RunData
from extensions.distributed import watchdog
from extensions.distributed.signals import Stopped
from extensions.distributed.strategy import Strategy
from extensions.evaluation.metrics import Prediction, score, score_all
from extensions.model.loading import load_config, load_tokenizer
from extensions.recipe import Model, Recipe
from extensions.reporting.scores import before_after_table
from extensions.runs.folder import RunFolder
from extensions.tasks import Task

# ---------------------------------------------------------------------------------------------------------- rows


@dataclass
class Job:
    """The fine-tuning of one task, and the rows that its model answers."""

    task: Task
    train: list[Example]
    validation: list[Example]  # their score chooses the epoch
    table: list[Example] = field(default_factory=list)  # of the task, and of those that it teaches
    test: list[Example] = field(default_factory=list)  # likewise; to be answered for the evaluation server
    start: str | None = None  # task whose fine-tuned encoder it starts from; None: the model of the recipe

    @property
    def examples(self) -> list[Example]:
        return [*self.train, *self.validation, *self.table, *self.test]


def load_jobs(recipe: Recipe, warn: Callable[[str], None]) -> tuple[list[Job], dict[str, str]]:
    """What to fine-tune, the intermediate task first, and task name -> split of its rows in the table.

    Raises:
        UserError: no task has training rows, or see `RunData.of_task`.
    """
    tasks, first = recipe.data.tasks, recipe.encoder.intermediate
    trained = [task for task in tasks if has_split(task, "train")]
    check_trainable(tasks)
    jobs: dict[str, Job] = {}
    splits: dict[str, str] = {}
    if first is not None:
        jobs[first.name] = _intermediate(recipe, first, trained, warn)
    # RunData reads validation rows where a run validates; here each epoch does.
    evaluation = recipe.evaluation.model_copy(update={"every_steps": 1})
    settings = recipe.model_copy(update={"evaluation": evaluation})
    for task in trained:
        _check_labelled(task)
        part = RunData.of_task(settings, task, warn)
        jobs[task.name] = Job(task, part.train, part.validation, part.table, part.test)
        splits |= part.splits
        if first is not None and task.name in recipe.encoder.intermediate_for and task.name != first.name:
            jobs[task.name].start = first.name
    for task in [task for task in tasks if not has_split(task, "train")]:
        teacher = jobs.get(task.train_task or "")
        if teacher is None or not _same_form(task, teacher.task):
            warn(
                f"{task.display_name} is left out: it has no training rows, and encoders answer it by the model of "
                f"{task.train_task or 'the task in its train_task'}, which is not in data.tasks with the same fields "
                "and labels"
            )
            continue
        part = RunData.of_task(settings, task, warn)
        teacher.table, teacher.test = [*teacher.table, *part.table], [*teacher.test, *part.test]
        splits |= part.splits
    return list(jobs.values()), splits


def _intermediate(recipe: Recipe, task: Task, trained: Sequence[Task], warn: Callable[[str], None]) -> Job:
    """The intermediate task; its rows are in no table. Where the recipe also evaluates it, that job takes its place."""
    wanted = recipe.encoder.intermediate_for
    if not any(other.name in wanted and other.name != task.name for other in trained):
        raise UserError(
            f"encoder.intermediate: {task.name} would serve nothing, since none of encoder.intermediate_for "
            f"({', '.join(wanted) or 'empty'}) is in data.tasks; leave it out, or add such a task"
        )
    if not has_split(task, "train"):
        raise UserError(f"encoder.intermediate: {task.name} has no training rows; choose a task that has, as mnli")
    _check_labelled(task)
    train = load_training(task, recipe.data.root, recipe.data.max_train_samples, recipe.seed, warn)
    validation = load_examples(task, "validation", recipe.data.root, recipe.seed, warn)
    return Job(task, train, subsample_evenly(validation, recipe.evaluation.validation_samples))


def _check_labelled(task: Task) -> None:
    if not is_labelled(task, "validation"):
        raise UserError(
            f"task {task.name} has no labelled validation split, which chooses the epoch to keep; give its file as "
            "source.files.validation"
        )


def _same_form(task: Task, other: Task) -> bool:
    """Whether a model of `other` can answer `task`."""
    return (task.fields, set(task.labels), task.score_range) == (other.fields, set(other.labels), other.score_range)


# --------------------------------------------------------------------------------------------------------- input


def segments(example: Example, sep: str) -> tuple[str, str | None]:
    """First and second segment: the task's long text, which alone is cut, and its other fields in order."""
    task = example.task
    others = [example.fields[name] for name in task.fields if name != task.long_field]
    return example.fields[task.long_field], f" {sep} ".join(others) if others else None


class Input:
    """From examples to tensors.

    Args:
        max_tokens: longest input; the first segment is cut to it, never the second.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    def check(self, examples: Sequence[Example]) -> None:
        """Raises UserError for a row whose second segment leaves no room for the first."""
        for example in examples:
            second = segments(example, self.tokenizer.sep_token)[1]
            if second is None or len(second.encode()) + 8 < self.max_tokens:  # no token is shorter than a byte
                continue
            needed = len(self.tokenizer("", second, verbose=False)["input_ids"]) + 1
            if needed > self.max_tokens:
                task = example.task
                others = ", ".join(name for name in task.fields if name != task.long_field)
                raise UserError(
                    f"encoder.max_tokens: {self.max_tokens} is too short for row {example.index} of {task.name}: "
                    f"only {task.long_field} is cut, and {others} alone need {needed} tokens; raise it, or leave that "
                    "row out"
                )

    def rows(self, examples: Sequence[Example], labelled: bool) -> list[dict[str, Any]]:
        """A data set of the Trainer: text, and with `labelled` the class number or score."""
        found = []
        for example in examples:
            first, second = segments(example, self.tokenizer.sep_token)
            row: dict[str, Any] = {"first": first, "second": second}
            if labelled:
                task, label = example.task, str(example.label)
                row["label"] = float(label) if task.is_regression else list(task.labels).index(label)
            found.append(row)
        return found

    def collate(self, rows: Sequence[dict[str, Any]]) -> BatchEncoding:
        """`input_ids`, `attention_mask`, ... (B, T), padded to the longest of the batch; `labels` (B,)."""
        batch = self.tokenizer(
            [row["first"] for row in rows],
            None if rows[0]["second"] is None else [row["second"] for row in rows],
            truncation="only_first",
            max_length=self.max_tokens,
            padding=True,
            return_tensors="pt",
        )
        if "label" in rows[0]:
            batch["labels"] = torch.tensor([row["label"] for row in rows])
        return batch


def load_input(model: Model, max_tokens: int | None) -> Input:
    """The tokenizer of an encoder, checked.

    Args:
        max_tokens: recipe key encoder.max_tokens; None: as long as the model allows.

    Raises:
        UserError: the model cannot be loaded, is no encoder, or takes less than `max_tokens`.
    """
    for key, value in (("adapter", model.adapter), ("load_in_4bit", model.load_in_4bit)):
        if value:
            raise UserError(f"model.{key}: {value} does not go with encoders, which are trained whole; leave it out")
    config = load_config(model)
    if config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or config.is_encoder_decoder:
        raise UserError(
            f"model.path: {model.path!r} is a {config.model_type} model and no encoder; launch/encoder.sh takes BERT "
            "and its like, for example google-bert/bert-base-uncased. For a decoder-only LLM use launch/ppo.sh or "
            "launch/sft.sh"
        )
    tokenizer = load_tokenizer(model)
    for name in ("sep_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise UserError(
                f"model.path: the tokenizer of {model.path!r} has no {name}, which encoder inputs need; add it to its "
                "tokenizer_config.json, or choose another encoder"
            )
    limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", sys.maxsize))
    if max_tokens is not None and max_tokens > limit:
        raise UserError(f"encoder.max_tokens: {max_tokens} is more than the {limit} that {model.path!r} can read")
    return Input(tokenizer, max_tokens or limit)


# --------------------------------------------------------------------------------------------------------- model


def load_encoder(
    model: Model, task: Task, seed: int, start: Path | None = None, warn: Callable[[str], None] = print
) -> PreTrainedModel:
    """An encoder in float32 with a fresh head for `task`: classes in the order of its labels, or one score.

    Args:
        seed: of the head.
        start: folder of a fine-tuned model whose encoder is taken; None: that of `model.path`.

    Raises:
        UserError: the weights cannot be loaded.
    """
    head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if not task.is_regression:
        names = dict(enumerate(task.labels))
        head = {
            "id2label": names,
            "label2id": {label: number for number, label in names.items()},
            "problem_type": "single_label_classification",
        }
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code, "dtype": torch.float32}
    if model.attn_implementation != "auto":
        options["attn_implementation"] = model.attn_implementation
    config = load_config(model)
    for key, value in head.items():
        setattr(config, key, value)
    path = str(start or model.path)
    level = transformers.logging.get_verbosity()
    try:
        transformers.logging.set_verbosity_error()  # it says at length that the head is not in the file
        source, info = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, UnpicklingError) as error:
        key = "the intermediate model" if start else "model.path"
        raise UserError(f"{key}: cannot load {path!r}: {' '.join(str(error).split())[:400]}") from error
    finally:
        transformers.logging.set_verbosity(level)
    missing = sorted(key for key in info["missing_keys"] if key.startswith(f"{source.base_model_prefix}."))
    if missing:
        warn(f"{path} lacks {len(missing)} tensors of the encoder, which start at random: {', '.join(missing[:3])}")
    # The head in a file, if any, is not wanted, also where its size fits (MNLI and CB have three labels): the body is
    # moved into a new model.
    transformers.set_seed(seed)
    fresh = AutoModelForSequenceClassification.from_config(config, **options)
    fresh.base_model.load_state_dict(source.base_model.state_dict())
    return fresh


def answers_of(labels: Sequence[str], examples: Sequence[Example], logits: Tensor) -> list[Prediction]:
    """Predictions from the outputs of a model.

    Args:
        labels: of the task that the model was trained on, in the order of its classes; empty for a regression.
        logits: (B, labels), or scores (B, 1).

    Raises:
        UserError: outputs that are no numbers.
    """
    if not torch.isfinite(logits).all():
        raise UserError(
            f"the model of {examples[0].task.name} gives outputs that are no numbers: its training diverged; use a "
            "lower encoder.lr"
        )
    found = []
    for example, row in zip(examples, logits.float(), strict=True):
        task, positive_probability = example.task, None
        answer: str | float
        if task.score_range is not None:
            low, high = task.score_range
            answer = min(max(float(row[0]), low), high)
            text = f"{answer:.3f}"
        else:
            answer = labels[int(row.argmax())]
            text = task.answer(answer)
            if task.is_ranked:
                positive_probability = float(row.softmax(dim=-1)[labels.index(str(task.positive))])
        found.append(
            Prediction(task.name, example.index, text, answer, example.label, example.kept, positive_probability)
        )
    return found


# ----------------------------------------------------------------------------------------------------------- run


def run(recipe: Recipe) -> None:
    """Fine-tune, evaluate and write the run folder of a recipe, on this rank.

    Everything that can be wrong in the recipe's data and model folder is found before the first training.
    """
    strategy = Strategy(recipe.seed, recipe.deepspeed, 0.0)  # for its ranks; the Trainer has its own engine
    strategy.setup_distributed()
    reporter = Reporter(active=strategy.is_rank_0())
    if not (reporter.active and sys.stderr.isatty()):
        transformers.utils.logging.disable_progress_bar()
    if recipe.encoder.batch_size % strategy.world_size:
        raise UserError(
            f"encoder.batch_size: {recipe.encoder.batch_size} samples cannot be shared evenly by {strategy.world_size} "
            f"ranks; use a multiple of {strategy.world_size}, or fewer ranks"
        )
    source = load_input(recipe.model, recipe.encoder.max_tokens)
    jobs, splits = load_jobs(recipe, reporter.warn)
    for job in jobs:
        source.check(job.examples)
    rows = [row for job in jobs for row in (*job.train, *job.validation, *job.table)]
    inputs = {"data": RunData(train=rows).fingerprint()}
    folder = RunFolder(recipe.run_dir, recipe, inputs, reporter.warn) if strategy.is_rank_0() else None
    if folder is not None and folder.set_aside is not None:
        reporter.info(f"an earlier run was moved to {folder.set_aside}")
    strategy.barrier()  # rank 0 has set up the folder
    with watchdog.watching(strategy.rank, recipe.deepspeed.timeout):
        EncoderRun(recipe, strategy, reporter, folder, source).go(jobs, splits)


class EncoderRun:
    """The jobs of a recipe, one after the other. Rank 0 alone has a folder."""

    def __init__(
        self, recipe: Recipe, strategy: Strategy, reporter: Reporter, folder: RunFolder | None, source: Input
    ) -> None:
        self.recipe, self.strategy, self.reporter, self.folder, self.source = recipe, strategy, reporter, folder, source
        self.root = recipe.run_dir

    def go(self, jobs: Sequence[Job], splits: dict[str, str]) -> None:
        for job in jobs:
            if (self.root / "tasks" / f"{job.task.name}.json").exists():
                self.reporter.info(f"{job.task.display_name}: finished before")
            else:
                self.fine_tune(job)
        if self.folder is not None:
            self.finish(self.folder, jobs, splits)

    def fine_tune(self, job: Job) -> None:
        """Train on one task, keep the best epoch, answer its rows; `tasks/TASK.json` is written last."""
        name, recipe = job.task.name, self.recipe
        start = f" from the model of {job.start}" if job.start else ""
        self.reporter.info(
            f"{job.task.display_name}: {len(job.train)} training rows, {recipe.encoder.epochs} epochs{start}"
        )
        model = load_encoder(
            recipe.model,
            job.task,
            recipe.seed,
            self.root / "models" / job.start if job.start else None,
            self.reporter.warn,
        )
        progress = Progress(self.reporter, job.task.display_name, self.strategy)
        validation = by_length(job.validation)

        def scores(outputs: EvalPrediction) -> dict[str, Any]:
            found = answers_of(list(job.task.labels), validation, torch.as_tensor(outputs.predictions))
            result = score(job.task, found, intervals=False)
            return {"score": result["score"], "result": result, "seconds": progress.seconds}

        checkpoints = self.root / "checkpoints" / name
        trainer = Trainer(
            model,
            self.arguments(checkpoints),
            self.source.collate,
            self.source.rows(job.train, labelled=True),
            self.source.rows(validation, labelled=True),
            compute_metrics=scores,
            callbacks=[progress],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=newest_epoch(checkpoints))
        if progress.stopped:
            raise Stopped
        table = self.answer(trainer, job, job.table)
        test = self.answer(trainer, job, job.test)
        if self.folder is not None:
            model.save_pretrained(self.root / "models" / name)
            self.source.tokenizer.save_pretrained(self.root / "models" / name)
            tasks = self.root / "tasks"
            tasks.mkdir(exist_ok=True)
            for kind, predictions in (("after", table), ("test", test)):
                write_jsonl(tasks / f"{name}.{kind}.jsonl", [asdict(prediction) for prediction in predictions])
            record = {
                "steps": trainer.state.global_step,
                "samples": len(job.train) * recipe.encoder.epochs,
                "seconds": progress.seconds,
                "epochs": epochs_of(trainer.state, len(job.train)),
                "scores": score_all(recipe.data.tasks, table),
            }
            write_json(tasks / f"{name}.json", record)
            shutil.rmtree(self.root / "checkpoints")
        trainer.accelerator.free_memory()  # for the next model
        self.strategy.barrier()  # which may start from this one

    def arguments(self, checkpoints: Path) -> TrainingArguments:
        """The Trainer's settings: an epoch is validated and saved, and the best one is loaded at the end."""
        encoder, model, cpu = self.recipe.encoder, self.recipe.model, self.strategy.device.type == "cpu"
        return TrainingArguments(
            output_dir=str(checkpoints),
            per_device_train_batch_size=encoder.batch_size // self.strategy.world_size,
            per_device_eval_batch_size=self.recipe.evaluation.batch_size,
            num_train_epochs=encoder.epochs,
            learning_rate=encoder.lr,
            lr_scheduler_type="linear",
            warmup_steps=encoder.warmup_ratio,  # below 1 it is a share
            weight_decay=encoder.weight_decay,
            eval_strategy="epoch",
            save_strategy="epoch",
            logging_strategy="epoch",
            save_total_limit=1,  # besides the best
            load_best_model_at_end=True,
            metric_for_best_model="score",
            greater_is_better=True,
            seed=self.recipe.seed,
            bf16=model.dtype == "bfloat16" or (model.dtype == "auto" and not cpu),
            gradient_checkpointing=model.gradient_checkpointing,
            use_cpu=cpu,
            ddp_backend="gloo" if cpu else None,
            # True multiplies a loss by the number of ranks, for models that divide it by the tokens of all; classifiers
            # take their own mean (transformers 5.15), so gradients would grow with the ranks, into the clipping.
            average_tokens_across_devices=False,
            ddp_find_unused_parameters=False,  # there are none, and the search costs time
            dataloader_pin_memory=not cpu,
            remove_unused_columns=False,  # the collator reads text
            disable_tqdm=True,
            report_to=[],
        )

    def answer(self, trainer: Trainer, job: Job, examples: Sequence[Example]) -> list[Prediction]:
        """An answer to each example, in their order; the same on every rank."""
        if not examples:
            return []
        ordered = by_length(examples)
        outputs = trainer.predict(self.source.rows(ordered, labelled=False))
        found = answers_of(list(job.task.labels), ordered, torch.as_tensor(outputs.predictions))
        by_row = {(prediction.task, prediction.index): prediction for prediction in found}
        return [by_row[example.task.name, example.index] for example in examples]

    def finish(self, folder: RunFolder, jobs: Sequence[Job], splits: dict[str, str]) -> None:
        """Put the records of the tasks together, and show the table.

        The files are made whole from `tasks/`, so they are the same however often the run stopped.
        """
        recipe, tasks = self.recipe, folder.root / "tasks"
        records = {job.task.name: read_json(tasks / f"{job.task.name}.json") for job in jobs}
        folder.start_trackers(recipe, 0)
        (folder.root / "metrics.jsonl").unlink(missing_ok=True)
        validations, step, samples, seconds = [], 0, 0, 0.0
        for name, record in records.items():
            rows, before = record["samples"] // recipe.encoder.epochs, seconds
            for epoch in record["epochs"]:
                place = {
                    "step": step + epoch["step"],
                    "samples": samples + epoch["samples"],
                    "task": name,
                    "epoch": epoch["epoch"],
                }
                elapsed = seconds + epoch["seconds"]
                phase, before = elapsed - before, elapsed
                speed = {"seconds": {"train": phase}, "samples_per_s": rows / phase}
                folder.metrics(place | {"elapsed_s": elapsed, **speed, "loss": epoch["loss"]})
                result = epoch["result"]
                validations.append(place | {"seconds": elapsed, "mean": result["score"], "tasks": {name: result}})
            step, samples, seconds = step + record["steps"], samples + record["samples"], seconds + record["seconds"]
        write_jsonl(folder.root / "validation.jsonl", validations)
        for kind in ("after", "test") if recipe.evaluation.predict_test else ("after",):
            lines = [line for name in records for line in read_jsonl(tasks / f"{name}.{kind}.jsonl")]
            write_jsonl(folder.root / f"predictions_{kind}.jsonl", lines)
        found = {name: scores for record in records.values() for name, scores in record["scores"].items()}
        after = {task.name: found[task.name] for task in recipe.data.tasks if task.name in found}
        split = " and ".join(sorted(set(splits.values())))
        write_json(
            folder.root / "eval.json",
            {
                "method": recipe.method,
                "split": split,
                "splits": splits,
                "after": after,
                "training": {"tasks": list(records), "steps": step, "samples": samples, "seconds": seconds},
            },
        )
        folder.close()
        self.reporter.info(f"{samples} samples in {step} steps, {seconds / 60:.1f} minutes of training")
        self.reporter.console.print(before_after_table(recipe.data.tasks, None, after, split))
        self.reporter.info(f"models: {folder.root / 'models'}")


class Progress(TrainerCallback):
    """Training seconds, without the validations; what is printed while the Trainer works; ending it when told to."""

    def __init__(self, reporter: Reporter, title: str, strategy: Strategy) -> None:
        self.reporter, self.title, self.strategy = reporter, title, strategy
        self.seconds = 0.0
        self.stopped = False
        self._training = False
        self._started = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds = next(
            (entry["eval_seconds"] for entry in state.log_history[::-1] if "eval_seconds" in entry), 0.0
        )
        self.reporter.progress(0, state.max_steps)
        self._training = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training = False

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The answers to the table are given again; a validation ends, since its epoch is not saved yet."""
        watchdog.heartbeat()
        if not self._training and self.strategy.stopping():
            raise Stopped

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        watchdog.heartbeat()
        if self.strategy.stopping():
            self.stopped = control.should_save = control.should_training_stop = True
        batch = args.train_batch_size * args.world_size
        self.reporter.progress(state.global_step * batch, state.max_steps * batch)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds += time.monotonic() - self._started

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        value = 100 * kwargs["metrics"]["eval_score"]
        self.reporter.info(
            f"{self.title}, epoch {round(state.epoch or 0)} of {state.num_train_epochs}: validation {value:.1f}"
        )


def by_length(examples: Sequence[Example]) -> list[Example]:
    """Rows of like length next to each other, task by task, so that batches hold little padding."""
    return sorted(examples, key=lambda example: (example.task.name, sum(map(len, example.fields.values()))))


def newest_epoch(checkpoints: Path) -> str | None:
    """The Trainer's last complete checkpoint of a task; it writes trainer_state.json last."""
    complete = [path.parent for path in checkpoints.glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def epochs_of(state: TrainerState, rows: int) -> list[dict[str, Any]]:
    """Loss and validation of each epoch, from the Trainer's log.

    Args:
        rows: training rows of an epoch.
    """
    losses = {entry["step"]: entry["loss"] for entry in state.log_history if "loss" in entry}
    return [
        {
            "epoch": round(entry["epoch"]),
            "step": entry["step"],
            "samples": round(entry["epoch"] * rows),
            "seconds": entry["eval_seconds"],
            "loss": losses.get(entry["step"]),
            "result": entry["eval_result"],
        }
        for entry in state.log_history
        if "eval_result" in entry
    ]
