"""A training run, from its first evaluation to its model card.

The iterations are the trainer's (`extensions.training`), the answers the evaluator's (`extensions.evaluation`). This
module has what surrounds them: validations, early stopping, checkpoints, records, adapter, scores.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from extensions.common.console import Reporter
from extensions.common.errors import UserError
from extensions.common.files import move_into, read_json, read_jsonl, unused_path, write_text
from extensions.data import Example, subsample_evenly
from extensions.data.splits import RunData
from extensions.distributed import signals, watchdog
from extensions.distributed.nonfinite import NonFiniteError, NonFiniteTensor
from extensions.distributed.strategy import Strategy
from extensions.evaluation.evaluator import Evaluator, fixed_answers
from extensions.evaluation.label_suspects import FILE as SUSPECTS
from extensions.evaluation.label_suspects import find_suspects, write_suspects
from extensions.evaluation.metrics import likelihood_mean, mean_score, score_all
from extensions.inference.manifest import Manifest
from extensions.recipe import Recipe, RunSchedule, load_recipe
from extensions.reporting.model_card import model_card
from extensions.reporting.plots import loss_curve, reward_curve
from extensions.runs.checkpoint import Checkpoints
from extensions.runs.evaluation_run import AFTER, Run
from extensions.runs.failed_batch import write_and_explain, write_part
from extensions.runs.folder import CHANGES, RunFolder
from extensions.runs.health import HealthMonitor
from extensions.runs.resume import evaluated_as
from extensions.tasks import Task
from extensions.training.trainer import Trainer

BEFORE = "predictions_before.jsonl"
NO_BEST = {"metric": None, "step": 0, "since": 0}


class TrainingRun(Run):
    """Evaluation before, iterations with validations and checkpoints, adapter, evaluation after, model card."""

    def __init__(
        self,
        recipe: Recipe,
        strategy: Strategy,
        reporter: Reporter,
        folder: RunFolder | None,
        data: RunData,
        evaluator: Evaluator,
        trainer: Trainer,
        schedule: RunSchedule,
    ) -> None:
        super().__init__(recipe, strategy, reporter, folder, data, evaluator)
        self.trainer, self.schedule, self.last_step = trainer, schedule, schedule.steps
        self.best: dict[str, Any] = dict(NO_BEST)
        self.best_state: dict[str, Tensor] | None = None
        kl = recipe.ppo.kl.target if recipe.method == "ppo" and recipe.ppo.kl.init > 0 else None
        self.health = HealthMonitor(recipe.data.tasks, kl)
        self.checkpoints = self.make_checkpoints()
        self.evaluated = evaluated_as(recipe, data)  # once: it reads all rows
        self.step = 0
        self.validated = 0  # step of the last validation
        self.saved: tuple[int, int] | None = None  # step and `validated` of the last checkpoint
        self.seconds = 0.0  # of training, over all sessions
        self.iterated = False  # whether this session has trained

    def make_checkpoints(self) -> Checkpoints:
        return Checkpoints(self.recipe.run_dir, self.strategy, self.trainer.engine, self.recipe.checkpoint.keep)

    def go(self) -> None:
        self.resume()
        self.reporter.done, self.reporter.last_step = self.step, self.last_step
        self.reporter.validate_every = self.schedule.validate_every
        self.schedule.describe(self.reporter.info, self.reporter.warn)
        if self.folder is not None:
            self.folder.start_trackers(self.recipe, self.step)
        try:
            with watchdog.watching(self.strategy.rank, self.recipe.deepspeed.timeout):
                self._go()
        except signals.Stopped:
            if self.saved != (self.step, self.validated) and not self.save_checkpoint():
                raise SaveError("the run was asked to stop, and its state could not be saved") from None
            if self.folder is not None:
                self.folder.write_page(self.last_step, running=False)
                self.folder.close("stopped")
            raise

    def _go(self) -> None:
        if self.recipe.evaluation.yardsticks and "yardsticks" not in self.scores:
            self.compute_yardsticks(self.trainer.order.rows_until(self.last_step))
        if self.recipe.evaluation.before and "before" not in self.scores and self.step == 0:
            self.evaluate("before", "before training, ", BEFORE, resumable=True)
            self.write_scores()
            self.evaluator.remove_parts()
            if self.folder is not None:
                self.folder.write_page(self.last_step)
        self.train()
        if self.best_state is not None:
            self.trainer.load_weights(self.best_state)
            best = f"at step {self.best['step']}: {100 * self.best['metric']:.1f}"
            self.reporter.info(f"kept the best validation, {self._criterion}, {best}")
        self.save_adapter()
        # Answers of a killed session are reused if this one has the same weights: those of the last checkpoint.
        resumable = self.saved == (self.step, self.validated)
        if self.iterated:
            self.evaluator.remove_parts()
        self.evaluate("after", "after training, ", AFTER, resumable)
        self.answer_test(resumable)
        self.check_labels()
        self.finish()
        self.evaluator.remove_parts()

    def train(self) -> None:
        """Iterations, with validations and checkpoints where they are due. Stop requests take effect between two."""
        checkpoints = self.recipe.checkpoint.every_steps
        self.reporter.begin(self.last_step, self.step)
        try:
            if checkpoints and self.saved is None:
                self.save_checkpoint()  # keeps the scores of the evaluation before training
            while True:
                if self.schedule.validates_after(self.step) and self.validated < self.step:
                    self._validate()
                done = self.step >= self.last_step or self._stopped_early()
                new_best = self.step > 0 and self.best["step"] == self.step
                due = checkpoints and (done or new_best or (self.step > 0 and self.step % checkpoints == 0))
                if due and self.saved != (self.step, self.validated):
                    self.save_checkpoint()
                if done:
                    break
                if self.strategy.stopping():
                    raise signals.Stopped
                self._iterate()
        finally:
            self.reporter.end()

    def _iterate(self) -> None:
        self.reporter.phase("training")
        start, cpu, self.iterated = time.monotonic(), time.process_time(), True
        try:
            metrics, records = self.trainer.iterate(self.step)
        except NonFiniteError as error:
            raise NonFiniteBatchError(self._explained(error)) from error
        except UserError as error:  # an invalid reward, on this rank alone
            with suppress(OSError):
                problem = NonFiniteTensor(f"reward: {error}", [], "")
                write_part(self._failed, self.strategy.rank, [problem], *self.trainer.debug_snapshot(), None)
            last = "starts again" if self.saved is None else f"resumes after step {self.saved[0]}"
            raise UserError(
                f"{error}\nThe batch is in {self._failed}. Repair {self.recipe.reward} and run the same command again: "
                f"it {last}"
            ) from error
        self.step += 1
        self.seconds += time.monotonic() - start
        clocks = {"elapsed_s": self.seconds, "cpu_s": time.process_time() - cpu}
        self._record(metrics | clocks, records)

    def _stopped_early(self) -> bool:
        return bool(self.schedule.patience) and self.best["since"] >= self.schedule.patience

    def _record(self, metrics: dict[str, Any], records: list[dict[str, Any]]) -> None:
        if self.folder is None:
            return
        self.folder.metrics(metrics)
        kept = records[: self.recipe.logging.rollout_samples]
        self.folder.append("rollouts.jsonl", [{"step": metrics["step"], **record} for record in kept])
        self.reporter.step(metrics["step"], *self.trainer.summary_lines(metrics))
        for warning in self.health.step(metrics, records):
            self.reporter.warn(warning)

    def _validate(self) -> None:
        predictions = self.evaluator.predict(self.data.validation, f"at step {self.step}, validation split")
        scores = score_all(self.recipe.data.tasks, predictions, intervals=False)
        mean, by_likelihood = mean_score(scores), likelihood_mean(scores)
        metric = mean
        if self.recipe.evaluation.best_by == "likelihood":
            assert by_likelihood is not None  # see `likelihood.compared_beside_sampled`
            metric = by_likelihood
        better = self.best["metric"] is None or metric > self.best["metric"]
        if better:
            self.best = {"metric": metric, "step": self.step, "since": 0}
            self.best_state = self.trainer.weights()
        elif self.schedule.counts_for_patience(self.step):
            self.best["since"] += 1
        self.validated = self.step
        best = "best so far" if better else f"best {100 * self.best['metric']:.1f} at step {self.best['step']}"
        waiting = "" if better else self.schedule.waiting(self.step, self.best["since"])
        beside = self.recipe.evaluation.decoding != "likelihood" and by_likelihood is not None
        other = f"by likelihood {100 * (by_likelihood or 0):.1f}; " if beside else ""
        self.reporter.info(f"validation {100 * mean:.1f} ({other}{best}, {self._criterion}{waiting})")
        if self.folder is not None:
            shown = fixed_answers(predictions, self.data.validation, self.recipe.logging.rollout_samples)
            means = {"mean": mean, "likelihood_mean": by_likelihood}
            place = {"step": self.step, "samples": self.samples, "seconds": self.seconds}
            self.folder.validation({**place, **means, "tasks": scores, "answers": shown})
            for warning in self.health.validation(self.step, scores):
                self.reporter.warn(warning)
            self.folder.write_page(self.last_step)

    @property
    def _criterion(self) -> str:
        """How the answers are made whose score selects the best validation."""
        settings = self.recipe.evaluation
        names = {"sample": "by sampled answers", "greedy": "by greedy answers", "likelihood": "by likelihood"}
        return names["likelihood" if settings.best_by == "likelihood" else settings.decoding]

    @property
    def samples(self) -> int:
        """Training samples so far."""
        return self.step * self.recipe.training_batch

    # ------------------------------------------------------------------------------------------ failed batches

    @property
    def _failed(self) -> Path:
        return self.recipe.run_dir / "failed" / f"step-{self.step + 1}"

    def _explained(self, error: NonFiniteError) -> str:
        """The message of a failed batch, which is written to the run folder. Call it on every rank."""
        found = write_and_explain(error.problems, self.trainer, self.strategy, self._failed)
        return (
            f"step {self.step + 1}: non-finite values, found before the update, so the weights are unchanged:\n"
            f"{found}\nThe batch is in {self._failed}; inspect it with: nlu replay {self._failed}\nOften of help: a "
            "lower optimizer.lr, model.dtype=float32, a smaller ppo.clip; with another recipe choose another output_dir"
        )

    # -------------------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(self) -> bool:
        """Write a checkpoint. Returns False, with a warning, where the disk refuses.

        Raises:
            SaveError: the disk refuses, and checkpoint.on_error is "stop".
        """
        self.reporter.phase("saving a checkpoint")
        self._compare_ranks()
        state = {
            "step": self.step,
            "validated": self.validated,
            "seconds": self.seconds,
            "trainer": self.trainer.state(),
            "health": self.health.state(),
            "best": self.best,
            "scores": self.scores,
            "last_step": self.last_step,
            "updates": self.recipe.num_updates(1),
            "evaluated": self.evaluated,
        }
        error = None
        if self.folder is not None:
            try:
                self.folder.sync()  # the records must be durable before the checkpoint is
            except OSError as refused:
                error = str(refused)
        error = self.strategy.gather(error)[0]
        if error is None:
            best_step = None if self.best["metric"] is None else self.best["step"]
            error = self.checkpoints.save(self.step, state, self.best_state, best_step)
        if error is None:
            self.saved = (self.step, self.validated)
            return True
        last = "there is no earlier one" if self.saved is None else f"that of step {self.saved[0]} is unchanged"
        message = f"the checkpoint of step {self.step} could not be written ({error}); {last}"
        if self.recipe.checkpoint.on_error == "stop":
            raise SaveError(message)
        self.reporter.warn(f"{message}. The run continues without it; free some space")
        return False

    def _compare_ranks(self) -> None:
        """Warn about silent divergence between replicas: trained parameters that differ between ranks."""
        if self.strategy.world_size == 1 or self.strategy.stage == 3:  # ZeRO 3 keeps a single copy
            return
        digest = hashlib.sha256()
        for tensor in self.trainer.weights().values():
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        found = self.strategy.gather(digest.hexdigest())
        common = Counter(found).most_common(1)[0][0]
        others = [rank for rank, one in enumerate(found) if one != common]
        if others:
            self.reporter.warn(
                f"step {self.step}: the trained parameters of rank {', '.join(map(str, others))} differ from those of "
                "the other ranks, so the run no longer follows its recipe. Possible causes: a reward that is not the "
                "same on each call (compare two `nlu preview RECIPE`), or a faulty device; stop, and resume from a "
                "checkpoint before this one"
            )

    def resume(self) -> None:
        """Resume from the newest intact checkpoint in the run folder, if there is one."""
        checkpoint = self.checkpoints.newest(self.reporter.warn)
        if checkpoint is None:
            if self.folder is not None:
                self.folder.cut_back(0, 0)
            return
        self.checkpoints.load(checkpoint, self.reporter.warn)
        state = checkpoint.state
        self.step, self.validated, self.seconds = state["step"], state["validated"], state["seconds"]
        self.best, self.best_state, self.scores = state["best"], checkpoint.best, state["scores"]
        self.trainer.load_state(state["trainer"])
        self.health.load_state(state["health"])
        self.saved = (self.step, self.validated)
        self._follow_changes(state)
        if self.folder is not None:
            self.folder.cut_back(self.step, self.validated)
            if {"before", "yardsticks"} & self.scores.keys():
                self.write_scores()
        self.reporter.info(f"resuming after step {self.step} from {checkpoint.folder}")

    def _follow_changes(self, state: dict[str, Any]) -> None:
        """After a checkpoint of another recipe (`extensions.runs.resume`): drop scores that it does not share."""
        if state["updates"] != self.recipe.num_updates(1):
            self.checkpoints.set_schedule(self.recipe.num_updates(self.step))
        was, now = state["evaluated"], self.evaluated
        if was["table"] != now["table"]:
            self.evaluator.remove_parts()
            if self.folder is not None and (before := self.folder.root / BEFORE).exists():
                before.rename(unused_path(before.with_stem(f"{before.stem}-other"), "-"))
            if self.scores.pop("before", None) is not None:
                self.reporter.warn(
                    "the scores before training are of other rows, prompts or decoding, and are left out; "
                    "launch/eval.sh computes the new ones"
                )
            self.scores.pop("yardsticks", None)
        elif was["train"] != now["train"] or state["last_step"] != self.last_step:
            self.scores.pop("yardsticks", None)  # of other training rows
        if was["validation"] != now["validation"] and self.best["metric"] is not None:
            self.best, self.best_state = dict(NO_BEST), None
            self.reporter.warn(
                "the validations so far are of other rows, prompts or decoding; the best is sought among later ones"
            )
        if state["last_step"] < self.last_step:
            self.best["since"] = 0  # an early stop has no say in an extension

    # ------------------------------------------------------------------------------------------------- the end

    def save_adapter(self) -> None:
        """Write the adapter, before the last evaluations, which may take longer than the training."""
        self.reporter.phase("saving the adapter")
        state = self.trainer.weights() if self.best_state is None else self.best_state
        if self.folder is not None:
            temporary = self.folder.root / "adapter.tmp"
            critic = self.folder.root / "critic.tmp"
            self.trainer.save(temporary, critic, state)
            self.evaluator.encoder.tokenizer.save_pretrained(str(temporary))
            dtype = read_json(self.folder.root / "model.json")["dtype"]  # of the ranks' computation
            Manifest.of_run(self.recipe, self.evaluator.encoder, dtype, self.evaluator.label_sets).save(temporary)
            if critic.exists():
                move_into(critic, self.folder.root / "critic")
            move_into(temporary, self.folder.root / "adapter")

    def check_labels(self) -> None:
        """Write the training rows whose labels the trained model contradicts; an interrupted check starts again."""
        limit = self.recipe.evaluation.suspect_samples
        if not limit:
            return
        rows = [row for task in self.recipe.data.tasks for row in subsample_evenly(self._training_rows(task), limit)]
        predictions = self.evaluator.predict(rows, "of training, for label suspects", decoding="likelihood")
        suspects = find_suspects(rows, predictions)
        if self.folder is not None:
            write_suspects(suspects, rows, self.folder.root)
        where = f", in {SUSPECTS}" if suspects else ""
        self.reporter.info(
            f"{len(suspects)} of {len(rows)} training rows have labels that the trained model contradicts with high "
            f"confidence{where}: suspects, not errors"
        )

    def _training_rows(self, task: Task) -> list[Example]:
        return [example for example in self.data.train if example.task.name == task.name]

    def finish(self) -> None:
        """Write scores, curve and model card; print the table."""
        if self.folder is None:
            return
        root, recipe = self.folder.root, self.recipe
        tasks = list(dict.fromkeys(example.task.name for example in self.data.train))
        self.scores["training"] = {
            "tasks": tasks,
            "steps": self.step,
            "samples": self.samples,
            "seconds": self.seconds,
            "started_from": _method_of(recipe.model.adapter),
            "changes": read_jsonl(root / CHANGES) if (root / CHANGES).exists() else [],
        }
        self.folder.sync()
        metrics = read_jsonl(root / "metrics.jsonl")
        if recipe.method == "ppo":
            curve = root / "reward_curve.png"
            reward_curve(metrics, curve, f"{recipe.name}: PPO, {recipe.model.path}")
        else:
            curve = root / "loss_curve.png"
            loss_curve(metrics, curve, f"{recipe.name}: SFT, {recipe.model.path}")
        encoder, label_sets = self.evaluator.encoder, self.evaluator.label_sets
        card = model_card(recipe, self.scores, encoder=encoder, label_sets=label_sets)
        write_text(root / "adapter" / "README.md", str(card))
        self.write_scores()  # last: eval.json marks the run as finished
        self.folder.write_page(running=False)
        self.folder.close()
        self.reporter.info(
            f"{self.samples} samples in {self.step} iterations, {self.seconds / 60:.1f} minutes of training"
        )
        self.print_table()
        self.reporter.info(
            f"page:         {root / 'report.html'}\n"
            f"{curve.stem.replace('_', ' ')}: {curve}\nadapter:      {root / 'adapter'}\n"
            f"new rows:     nlu predict {root} new.csv --out answers.csv"
        )


def _method_of(adapter: str | None) -> str | None:
    """The method that trained an adapter, if the recipe of its run is beside it."""
    try:
        return load_recipe(Path(adapter).parent / "recipe.yaml").method if adapter is not None else None
    except UserError:
        return None


class SaveError(Exception):
    """A checkpoint could not be written, and the run stops."""


class NonFiniteBatchError(Exception):
    """A batch has non-finite values; the message says where."""
