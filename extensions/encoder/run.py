"""Encoder baselines (section 5.2 of the paper): BERT, fine-tuned on the same tasks, rows and metrics as the LLM.

transformers' `Trainer` does the training. There is one model per task with training rows; evaluation-only tasks
(MNLI-mm, AX, AX-b, AX-g) are predicted by the model of their `train_task`. BERT-large++ is first fine-tuned on an
intermediate task (section 5.4; STILTs, Phang et al. 2018).

In addition to the files of every run, the run folder has:

models/TASK        fine-tuned model and tokenizer
tasks/TASK.json    scores and epochs of a finished task; a resumed run skips the task
checkpoints/TASK   the Trainer's checkpoints of the current task
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import EvalPrediction, PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from extensions.common.console import Reporter
from extensions.common.errors import UserError
from extensions.common.files import read_json, read_jsonl, write_json, write_jsonl
from extensions.data import Example
from extensions.data.splits import RunData
from extensions.distributed import watchdog
from extensions.distributed.signals import Stopped
from extensions.distributed.strategy import Strategy
from extensions.encoder.jobs import Job, load_jobs
from extensions.encoder.model import SegmentCollator, load_collator, load_encoder, predictions_of
from extensions.evaluation.evaluator import fixed_answers, records
from extensions.evaluation.metrics import Prediction, likelihood_mean, score, score_all
from extensions.evaluation.yardsticks import compute_yardsticks
from extensions.recipe import Recipe
from extensions.reporting.scores import before_after_table, own_class_tables
from extensions.reporting.yardstick_lines import comparison_lines, print_yardsticks
from extensions.runs.answer_health import unpredicted_warnings
from extensions.runs.folder import RunFolder
from extensions.runs.resume import input_rows


def run_encoder(recipe: Recipe) -> None:
    """Fine-tune, evaluate and write the run folder of a recipe, on this rank.

    Errors in the recipe's data and model folder are reported before any training.
    """
    strategy = Strategy(recipe.seed, recipe.deepspeed, 0.0)  # for its process group; the Trainer has its own engine
    strategy.setup_distributed()
    reporter = Reporter(active=strategy.is_rank_0())
    if not (reporter.active and sys.stderr.isatty()):
        transformers.utils.logging.disable_progress_bar()
    if recipe.encoder.batch_size % strategy.world_size:
        raise UserError(
            f"encoder.batch_size: {recipe.encoder.batch_size} samples cannot be shared evenly by {strategy.world_size} "
            f"ranks; use a multiple of {strategy.world_size}, or fewer ranks"
        )
    collator = load_collator(recipe.model, recipe.encoder.max_tokens)
    jobs = load_jobs(recipe, reporter.warn)
    data = RunData.joined(recipe, [job.data for job in jobs])
    collator.check(data.rows)
    for what, rows in (("training", data.train), ("validation", data.validation), ("test", data.test)):
        collator.check_lengths(rows, f"{what} rows", reporter.warn)
    if data.split != "validation":
        collator.check_lengths(data.table, f"{data.split} rows of the table", reporter.warn)
    folder = None
    if strategy.is_rank_0():
        folder = RunFolder(recipe.run_dir, recipe, input_rows(data), reporter, strategy.world_size)
    strategy.barrier()  # rank 0 has set up the folder
    with watchdog.watching(strategy.rank, recipe.deepspeed.timeout):
        EncoderRun(recipe, strategy, reporter, folder, collator, data).go(jobs)


@dataclass
class EncoderRun:
    """Runs the jobs of a recipe in sequence. Only rank 0 has a folder."""

    recipe: Recipe
    strategy: Strategy
    reporter: Reporter
    folder: RunFolder | None
    collator: SegmentCollator
    data: RunData

    def go(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if (self.recipe.run_dir / "tasks" / f"{job.task.name}.json").exists():
                self.reporter.info(f"{job.task.display_name}: finished before")
            else:
                self.fine_tune(job)
        if self.folder is not None:
            self.finish(self.folder, [job.task.name for job in jobs])

    def fine_tune(self, job: Job) -> None:
        """Train on one task, keep the best epoch, predict its rows; `tasks/TASK.json` is written last."""
        task, train, recipe, root = job.task, job.data.train, self.recipe, self.recipe.run_dir
        start = f" from the model of {job.start}" if job.start else ""
        self.reporter.info(f"{task.display_name}: {len(train)} training rows, {recipe.encoder.epochs} epochs{start}")
        source = root / "models" / job.start if job.start else None
        model = load_encoder(recipe.model, task, recipe.seed, source, self.reporter.warn)
        progress = Progress(self.reporter, task.display_name, self.strategy)
        validation = by_length(job.data.validation)

        def scores(outputs: EvalPrediction) -> dict[str, Any]:
            found = predictions_of(list(task.labels), validation, torch.as_tensor(outputs.predictions))
            result = score(task, found, intervals=False)
            shown = fixed_answers(found, validation, recipe.logging.rollout_samples)
            clocks = {"seconds": progress.seconds, "cpu_s": progress.cpu_s}
            return {"score": result["score"], "result": result, "answers": shown, **clocks}

        checkpoints = root / "checkpoints" / task.name
        trainer = Trainer(
            model,
            training_arguments(recipe, self.strategy, checkpoints),
            self.collator,
            train,
            validation,
            compute_metrics=scores,
            callbacks=[progress],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=newest_checkpoint(checkpoints))
        if progress.stopped:
            raise Stopped
        yardsticks = self.yardsticks(job)
        table = self.answer(trainer, job, job.data.table)
        test = self.answer(trainer, job, job.data.test)
        if self.folder is not None:
            model.save_pretrained(root / "models" / task.name)
            self.collator.tokenizer.save_pretrained(root / "models" / task.name)
            tasks = root / "tasks"
            tasks.mkdir(exist_ok=True)
            for kind, predictions, rows in (("after", table, job.data.table), ("test", test, job.data.test)):
                write_jsonl(tasks / f"{task.name}.{kind}.jsonl", records(predictions, rows))
            record = {
                "steps": trainer.state.global_step,
                "samples": len(train) * recipe.encoder.epochs,
                "seconds": progress.seconds,
                "epochs": epochs_of(trainer.state, len(train)),
                "scores": score_all(recipe.data.tasks, table),
                "yardsticks": yardsticks,
            }
            write_json(tasks / f"{task.name}.json", record)
            shutil.rmtree(root / "checkpoints")
        trainer.accelerator.free_memory()  # makes room for the next model
        self.strategy.barrier()  # the next model may start from this one

    def yardsticks(self, job: Job) -> dict[str, dict[str, Any]]:
        """Simple models of a job's rows; see `compute_yardsticks`."""
        recipe = self.recipe
        if not recipe.evaluation.yardsticks:
            return {}
        self.reporter.phase(f"computing yardsticks, {job.task.display_name}")
        found = compute_yardsticks(recipe.data.tasks, job.data.train, job.data.table, recipe.seed, self.strategy)
        print_yardsticks(recipe.data.tasks, found, self.reporter)
        return found

    def answer(self, trainer: Trainer, job: Job, examples: Sequence[Example]) -> list[Prediction]:
        """One prediction per example, in order; the same on every rank."""
        if not examples:
            return []
        ordered = by_length(examples)
        self.reporter.phase(f"evaluating {job.task.display_name}, after training")
        # With labels, the Trainer would also compute a loss and the validation metrics.
        outputs = trainer.predict([replace(example, label=None) for example in ordered])
        found = predictions_of(list(job.task.labels), ordered, torch.as_tensor(outputs.predictions))
        by_row = {(prediction.task, prediction.index): prediction for prediction in found}
        return [by_row[example.task.name, example.index] for example in examples]

    def finish(self, folder: RunFolder, names: Sequence[str]) -> None:
        """Merge the records of the tasks `names` into the files of a run, and print the table.

        The files are written from `tasks/` only, so they do not depend on interruptions.
        """
        recipe, root = self.recipe, folder.root
        records = {name: read_json(root / "tasks" / f"{name}.json") for name in names}
        folder.start_trackers(recipe, 0)
        (root / "metrics.jsonl").unlink(missing_ok=True)
        validations, total = [], {"steps": 0, "samples": 0, "seconds": 0.0}
        for name, record in records.items():
            before, cpu_before = total["seconds"], 0.0
            for epoch in record["epochs"]:
                result, elapsed = epoch["result"], total["seconds"] + epoch["seconds"]
                phase, before = elapsed - before, elapsed
                cpu, cpu_before = epoch["cpu_s"] - cpu_before, epoch["cpu_s"]
                place = {
                    "step": total["steps"] + epoch["step"],
                    "samples": total["samples"] + epoch["samples"],
                    "task": name,
                    "epoch": epoch["epoch"],
                }
                speed = {
                    "seconds": {"train": phase},
                    "samples_per_s": record["samples"] / recipe.encoder.epochs / phase,
                }
                folder.metrics(place | {"elapsed_s": elapsed, "cpu_s": cpu, **speed, "loss": epoch["loss"]})
                means = {"mean": result["score"], "likelihood_mean": likelihood_mean({name: result})}
                shown = {"tasks": {name: result}, "answers": epoch["answers"]}
                validations.append({**place, "seconds": elapsed, **means, **shown})
            total = {key: value + record[key] for key, value in total.items()}
        write_jsonl(root / "validation.jsonl", validations)
        for kind in ("after", "test") if recipe.evaluation.predict_test else ("after",):
            lines = [line for name in names for line in read_jsonl(root / "tasks" / f"{name}.{kind}.jsonl")]
            write_jsonl(root / f"predictions_{kind}.jsonl", lines)
        found = {name: scores for record in records.values() for name, scores in record["scores"].items()}
        after = {task.name: found[task.name] for task in recipe.data.tasks if task.name in found}
        yardsticks: dict[str, dict[str, Any]] = {}
        for record in records.values():
            for kind, results in record["yardsticks"].items():
                yardsticks.setdefault(kind, {}).update(results)
        scores: dict[str, Any] = {"method": recipe.method, "decoding": "likelihood"}  # the most probable class
        scores |= {"split": self.data.split, "splits": self.data.splits, "after": after}
        scores |= {"yardsticks": yardsticks} if yardsticks else {}
        write_json(root / "eval.json", scores | {"training": {"tasks": list(names), **total}})
        self.reporter.done = int(total["steps"])
        where = f"after training, {self.data.split} split"
        for text in unpredicted_warnings(recipe.data.tasks, after, where, recipe.method):
            self.reporter.warn(text)
        folder.write_page(running=False)
        folder.close()
        minutes = total["seconds"] / 60
        self.reporter.info(f"{total['samples']} samples in {total['steps']} steps, {minutes:.1f} minutes of training")
        table = before_after_table(recipe.data.tasks, None, after, self.data.split, yardsticks)
        self.reporter.console.print(table, *own_class_tables(recipe.data.tasks, after))
        print_yardsticks(recipe.data.tasks, yardsticks, self.reporter)
        for line in comparison_lines(recipe.data.tasks, yardsticks, after):
            self.reporter.info(line)
        self.reporter.info(f"models: {root / 'models'}\npage:   {root / 'report.html'}")


@dataclass(eq=False)
class Progress(TrainerCallback):
    """Training time (`cpu_s`: of the processor) without validations, console messages, and stop requests."""

    reporter: Reporter
    title: str
    strategy: Strategy
    seconds: float = 0.0
    cpu_s: float = 0.0
    stopped: bool = False
    _training: bool = False
    _started: tuple[float, float] = (0.0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logged = [(e["eval_seconds"], e["eval_cpu_s"]) for e in state.log_history if "eval_seconds" in e]
        self.seconds, self.cpu_s = logged[-1] if logged else (0.0, 0.0)  # of the interrupted run
        self.reporter.phase(f"training {self.title}")
        self.reporter.progress(0, state.max_steps)
        self._training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = False

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop predictions at once, since a resumed run repeats them. A validation continues: its epoch is unsaved."""
        watchdog.heartbeat()
        if not self._training and self.strategy.stopping():
            raise Stopped

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.monotonic(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        watchdog.heartbeat()
        if self.strategy.stopping():
            self.stopped = control.should_save = control.should_training_stop = True
        batch = args.train_batch_size * args.world_size
        self.reporter.progress(state.global_step * batch, state.max_steps * batch)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        start, cpu_start = self._started
        self.seconds += time.monotonic() - start
        self.cpu_s += time.process_time() - cpu_start

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        place = f"epoch {round(state.epoch or 0)} of {state.num_train_epochs}"
        self.reporter.info(f"{self.title}, {place}: validation {100 * kwargs['metrics']['eval_score']:.1f}")


def training_arguments(recipe: Recipe, strategy: Strategy, checkpoints: Path) -> TrainingArguments:
    """The Trainer's settings: each epoch is validated and saved, and the best one is loaded at the end."""
    encoder, model, cpu = recipe.encoder, recipe.model, strategy.device.type == "cpu"
    return TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=encoder.batch_size // strategy.world_size,
        per_device_eval_batch_size=recipe.evaluation.batch_size,
        num_train_epochs=encoder.epochs,
        learning_rate=encoder.lr,
        lr_scheduler_type="linear",
        warmup_steps=encoder.warmup_ratio,  # a value below 1 is a share
        weight_decay=encoder.weight_decay,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=1,  # besides the best
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        seed=recipe.seed,
        bf16=model.dtype == "bfloat16" or (model.dtype == "auto" and not cpu),
        gradient_checkpointing=model.gradient_checkpointing,
        use_cpu=cpu,
        ddp_backend="gloo" if cpu else None,
        # True multiplies the loss by the number of ranks, for models that divide it by the tokens of all ranks.
        # Classifiers average over their own rank's rows (transformers 5.15), so gradients would grow with the number of
        # ranks and be clipped.
        average_tokens_across_devices=False,
        ddp_find_unused_parameters=False,  # all parameters are used, and the search costs time
        dataloader_pin_memory=not cpu,
        remove_unused_columns=False,  # the collator reads examples
        disable_tqdm=True,
        report_to=[],
    )


def by_length(examples: Sequence[Example]) -> list[Example]:
    """Examples sorted by length, task by task, to reduce padding."""
    return sorted(examples, key=lambda example: (example.task.name, sum(map(len, example.fields.values()))))


def newest_checkpoint(checkpoints: Path) -> str | None:
    """The Trainer's last complete checkpoint of a task; it writes trainer_state.json last."""
    complete = [path.parent for path in checkpoints.glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def epochs_of(state: TrainerState, num_rows: int) -> list[dict[str, Any]]:
    """Loss and validation of each epoch of `num_rows` training rows, from the Trainer's log."""
    losses = {entry["step"]: entry["loss"] for entry in state.log_history if "loss" in entry}
    return [
        {
            "epoch": round(entry["epoch"]),
            "step": entry["step"],
            "samples": round(entry["epoch"] * num_rows),
            "seconds": entry["eval_seconds"],
            "cpu_s": entry["eval_cpu_s"],
            "loss": losses.get(entry["step"]),
            "result": entry["eval_result"],
            "answers": entry["eval_answers"],
        }
        for entry in state.log_history
        if "eval_result" in entry
    ]
