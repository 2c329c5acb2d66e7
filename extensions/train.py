"""A run, from a recipe to a run folder: data, model, engine, evaluations, checkpoints, adapter, report.

The training itself is a trainer's (`extensions.ppo`, `extensions.sft`), the answers are the evaluator's
(`extensions.evaluate`); here is everything around them.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import importlib
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from extensions import handover, likelihood, signals, watchdog
from extensions.checkpoint import Checkpoints
from extensions.console import Reporter
from extensions.data import BatchOrder, class_weights, epoch_sizes, rows_of_epoch
from extensions.data.checks import check_lengths
from extensions.data.splits import RunData
from extensions.errors import ProcessGone, UserError
from extensions.evaluate import Evaluator
from extensions.files import move_into, read_json, read_jsonl, sha256, write_json, write_text
from extensions.guard import BadNumber, Problem, leave
from extensions.loop import Trainer
from extensions.metrics import mean_score, score_all
from extensions.model.loading import load_config, load_policy, load_tokenizer, prompt_limit
from extensions.model.proof import Proof, proof_rows
from extensions.plots import loss_curve, reward_curve
from extensions.ppo import PpoTrainer
from extensions.prompts import PromptEncoder
from extensions.recipe import Recipe, load_recipe
from extensions.report import before_after_table, model_card
from extensions.rewards import Reward, check_reward, load_reward
from extensions.run import RunFolder, adapter_hash
from extensions.sft import SftTrainer
from extensions.strategy import Strategy
from extensions.tasks import Task
from extensions.vllm_engine import LocalSync, SyncError, make_sampler, probe_samples, require
from extensions.watch import Watch

AFTER = "predictions_after.jsonl"
TEST = "predictions_test.jsonl"  # what `nlu submit` reads


def run(recipe: Recipe) -> None:
    """Do what a recipe's method says and write its run folder, on this rank."""
    if recipe.engine == "ray":
        if os.environ.get("RANK", "0") == "0":  # Ray starts ranks of its own
            importlib.import_module("extensions.ray_engine.driver").start_run(recipe)
        return
    prepare(recipe).go()


def prepare(recipe: Recipe) -> Evaluation | Training:
    """Everything of a run but the work itself: data, model, engine, run folder.

    What can be wrong in the recipe's data, prompts, reward or folder is found before the model is loaded.
    """
    method, ppo = recipe.method, recipe.ppo
    strategy = Strategy(
        recipe.seed, recipe.deepspeed, recipe.sft.max_grad_norm if method == "sft" else ppo.max_grad_norm
    )
    strategy.setup_distributed(timedelta(seconds=max(1800.0, recipe.deepspeed.timeout + 2 * watchdog.GRACE)))
    reporter = Reporter(active=strategy.is_rank_0())
    if not (reporter.active and sys.stderr.isatty()):
        transformers.utils.logging.disable_progress_bar()
    _check_ranks(recipe, strategy.world_size)
    if recipe.rollout.engine == "vllm":
        require("vllm")
    reward = load_reward(recipe.reward)
    data = RunData.load(recipe, reporter.warn)
    if method == "ppo":
        check_reward(reward, data.train, reporter.warn)
    tokenizer, config = load_tokenizer(recipe.model), load_config(recipe.model)
    encoder = make_encoder(recipe, data, tokenizer, config, reporter.warn)
    sharded = recipe.deepspeed.zero_stage == 3
    folder = None
    if strategy.is_rank_0():
        folder = open_folder(recipe, reward, data, reporter)
    strategy.barrier()  # the folder is there
    reporter.say(f"{recipe.run_dir.name}: {data.describe()}; loading {recipe.model.path}")

    policy = load_policy(
        recipe.model,
        recipe.lora,
        ppo.critic if method == "ppo" else "none",
        recipe.rollout.temperature,
        strategy.device,
        recipe.seed,
        ppo.kl.reference if method == "ppo" and ppo.kl.init > 0 else "base",
        training=method != "eval",
        rows=proof_rows(data.train or data.table, encoder, config, recipe.rollout.max_new_tokens),
        same_forwards=sharded,
    )
    if len(paths := set(strategy.gather(str(policy.path)))) > 1:
        ways = "; ".join(sorted(paths))
        raise UserError(f"the ranks compute the model in different ways ({ways}); use devices of one kind")
    record_proof(policy.proof, folder, reporter)
    engine, steps = None, recipe.training_steps(epoch_rows(recipe, data))
    if method != "eval" or sharded:
        engine = strategy.wrap(policy, recipe.trained_with, recipe.schedule, num_updates(recipe, steps))
    lockstep = recipe.rollout.max_new_tokens if sharded else None
    sync = None
    if recipe.rollout.engine == "vllm":
        probed = probe_samples(data.train or data.table, encoder, recipe.vllm.probe_samples)
        sync = LocalSync(recipe, policy, strategy, probed, reporter.say)
    sampler = make_sampler(policy, tokenizer, recipe.evaluation.micro_batch_size, lockstep, sync)
    evaluator = Evaluator(recipe, strategy, reporter, sampler, encoder, recipe.run_dir, seen_sets(data))
    if method == "eval":
        return Evaluation(recipe, strategy, reporter, folder, data, evaluator)
    order = make_order(recipe, data)
    trainer: Trainer
    if method == "sft":
        trainer = SftTrainer(policy, engine, strategy, encoder, order, recipe.sft, recipe.seed)
    else:
        budget = (recipe.rollout.min_new_tokens, recipe.rollout.max_new_tokens)
        sampler = make_sampler(policy, tokenizer, ppo.micro_batch_size, lockstep, sync)
        trainer = PpoTrainer(policy, engine, strategy, sampler, encoder, reward, order, ppo, *budget, recipe.seed)
    return Training(recipe, strategy, reporter, folder, data, evaluator, trainer, steps)


def seen_sets(data: RunData) -> dict[str, list[str]]:
    """Multi-label task -> label sets of its training rows."""
    tasks = {example.task.name: example.task for example in data.train if example.task.multi_label}
    return {
        name: likelihood.seen_sets(task, [example.label for example in data.train if example.task.name == name])
        for name, task in tasks.items()
    }


def record_proof(proof: Proof, folder: RunFolder | None, reporter: Reporter) -> None:
    """Say how the model is computed, and leave what was measured in the run folder."""
    reporter.say(str(proof))
    if folder is not None:
        write_json(folder.root / "model.json", proof.as_json())


def _inputs(recipe: Recipe, reward: Reward, data: RunData) -> dict[str, str | None]:
    """Hashes of what the run reads besides the base model: a run that is resumed must read the same."""
    return {
        "model.adapter": adapter_hash(recipe.model.adapter),
        "reward": None if reward.packed_labels else sha256(reward.path),  # files of the project have its version
        "data": data.fingerprint(),
        "deepspeed.config": _hash_of(recipe.deepspeed.config),
    }


def _hash_of(path: str | None) -> str | None:
    """None where there is no such file: who reads it says so."""
    return sha256(Path(path)) if path is not None and Path(path).is_file() else None


def _check_ranks(recipe: Recipe, world_size: int) -> None:
    sizes: dict[str, dict[str, int | None]] = {
        "ppo": {"ppo.batch_size": recipe.ppo.batch_size, "ppo.mini_batch_size": recipe.ppo.mini_batch_size},
        "sft": {"sft.batch_size": recipe.sft.batch_size},
    }
    for key, value in sizes.get(recipe.method, {}).items():
        if value is not None and value % world_size:
            raise UserError(
                f"{key}: {value} samples cannot be shared evenly by {world_size} ranks; use a multiple of {world_size}"
            )


def _check_budget(task: Task, encoder: PromptEncoder, budget: int, warn: Callable[[str], None]) -> None:
    """Warn where a right answer is longer than what may be sampled: it would be cut, a wrong format each time."""
    tokens = {task.answer(label): len(ids) for label, ids in encoder.label_ids(task).items()}
    longest = max(tokens, key=lambda word: tokens[word])
    if tokens[longest] > budget:
        warn(
            f"{task.display_name}: the answer {longest!r} and the closing tag are {tokens[longest]} tokens, more than "
            f"rollout.max_new_tokens: {budget}; raise that, or no sampled answer can be right"
        )


def num_updates(recipe: Recipe, steps: int) -> int:
    """Optimizer steps of the whole run, of `steps` iterations."""
    if recipe.method == "sft":
        return steps
    ppo = recipe.ppo
    return steps * ppo.epochs * (ppo.batch_size // (ppo.mini_batch_size or ppo.batch_size))


def epoch_rows(recipe: Recipe, data: RunData) -> int:
    """Training rows of a pass over all tasks, repeated ones counted each time."""
    return sum(epoch_sizes(data.train, recipe.data.oversample).values())


def make_order(recipe: Recipe, data: RunData) -> BatchOrder:
    """Which training rows make up each batch."""
    settings = recipe.data
    sizes = epoch_sizes(data.train, settings.oversample)
    rows = rows_of_epoch(sizes, settings.mixing, settings.mixing_cap, settings.mixing_temperature)
    weights = class_weights(data.train) if settings.class_weights == "balanced" else None
    batch = recipe.training_batch
    return BatchOrder(data.train, batch, recipe.seed, settings.balanced, rows, settings.oversample, weights)


def make_encoder(
    recipe: Recipe, data: RunData, tokenizer: PreTrainedTokenizerBase, config: Any, warn: Callable[[str], None]
) -> PromptEncoder:
    """The prompts of a run.

    Args:
        config: of the model.

    Raises:
        UserError: a prompt cannot fit, or the tokenizer cannot write an answer.
    """
    prompt = recipe.prompt
    limit = prompt_limit(recipe, config)
    shown = data.demonstrations
    encoder = PromptEncoder(tokenizer, limit, prompt.chat_template, prompt.shots, shown, prompt.template_options)
    for task in recipe.data.tasks:
        encoder.check_answers(task)
    for example in (*data.train, *data.table, *data.validation, *data.test):
        encoder.check(example.task, example.fields)
    check_lengths(encoder, data.train, "training rows", warn)
    check_lengths(encoder, data.table, f"{data.split} rows", warn)
    for task in recipe.data.tasks if recipe.evaluation.decoding != "likelihood" else []:
        _check_budget(task, encoder, recipe.rollout.max_new_tokens, warn)
    return encoder


def open_folder(recipe: Recipe, reward: Reward, data: RunData, reporter: Reporter) -> RunFolder:
    """The run folder; by one process."""
    folder = RunFolder(recipe.run_dir, recipe, _inputs(recipe, reward, data), reporter.warn)
    if folder.set_aside is not None:
        reporter.say(f"an earlier run was moved to {folder.set_aside}")
    return folder


class Run:
    """What all runs have: a folder (rank 0 alone), scores, answers."""

    def __init__(
        self,
        recipe: Recipe,
        strategy: Strategy,
        reporter: Reporter,
        folder: RunFolder | None,
        data: RunData,
        evaluator: Evaluator,
    ) -> None:
        self.recipe, self.strategy, self.reporter, self.folder, self.data = recipe, strategy, reporter, folder, data
        self.evaluator = evaluator
        self.scores: dict[str, Any] = {"method": recipe.method, "split": data.split, "splits": data.splits}

    def evaluate(self, moment: str, when: str, file: str, resumable: bool = False) -> None:
        """Scores of the table's rows, on every rank."""
        title = f"{when}{self.data.split} split"
        predictions = self.evaluator.predict(self.data.table, title, file, resumable)
        self.scores[moment] = score_all(self.recipe.data.tasks, predictions)

    def answer_test(self, resumable: bool = False) -> None:
        if self.data.test:
            self.evaluator.predict(self.data.test, "of the test splits, for nlu submit", TEST, resumable)

    def write_scores(self) -> None:
        if self.folder is not None:
            write_json(self.folder.root / "eval.json", self.scores)

    def print_table(self) -> None:
        table = before_after_table(
            self.recipe.data.tasks, self.scores.get("before"), self.scores["after"], self.data.split
        )
        self.reporter.console.print(table)


class Evaluation(Run):
    """A model, adapter or prompt form as it is: section 5.2 of the paper. A killed one goes on where it stopped."""

    def go(self) -> None:
        start = time.monotonic()
        with watchdog.watching(self.strategy.rank, self.recipe.deepspeed.timeout):
            self.evaluate("after", "", AFTER, resumable=True)
            self.answer_test(resumable=True)
        self.write_scores()
        self.evaluator.forget_parts()
        if self.folder is not None:
            self.folder.close()
            self.reporter.say(f"{time.monotonic() - start:.0f} seconds")
            self.print_table()
            self.reporter.say(f"scores:  {self.folder.root / 'eval.json'}\nanswers: {self.folder.root / AFTER}")


class Training(Run):
    """A run from its first evaluation to its model card."""

    def __init__(
        self,
        recipe: Recipe,
        strategy: Strategy,
        reporter: Reporter,
        folder: RunFolder | None,
        data: RunData,
        evaluator: Evaluator,
        trainer: Trainer,
        steps: int,
    ) -> None:
        super().__init__(recipe, strategy, reporter, folder, data, evaluator)
        self.trainer, self.last_step = trainer, steps
        self.best: dict[str, Any] = {"metric": None, "step": 0, "since": 0}
        self.best_state: dict[str, Tensor] | None = None
        kl = recipe.ppo.kl.target if recipe.method == "ppo" and recipe.ppo.kl.init > 0 else None
        self.watch = Watch(recipe.data.tasks, kl)
        self.checkpoints = self.make_checkpoints()
        self.step = 0
        self.validated = 0  # step of the last validation
        self.saved: tuple[int, int] | None = None  # step and `validated` of the last checkpoint
        self.seconds = 0.0  # of training, over all sessions
        self.iterated = False  # in this session

    def make_checkpoints(self) -> Checkpoints:
        return Checkpoints(self.recipe.run_dir, self.strategy, self.trainer.engine, self.recipe.checkpoint.keep)

    def go(self) -> None:
        self.resume()
        if self.folder is not None:
            self.folder.start_trackers(self.recipe, self.step)
        try:
            with watchdog.watching(self.strategy.rank, self.recipe.deepspeed.timeout):
                self._go()
        except signals.Stopped:
            if self.saved != (self.step, self.validated) and not self.save_checkpoint():
                raise SaveError("the run was told to stop, and its state could not be saved; free some space") from None
            if self.folder is not None:
                self.folder.close()
            raise

    def _go(self) -> None:
        if self.recipe.evaluation.before and "before" not in self.scores:
            self.evaluate("before", "before training, ", "predictions_before.jsonl", resumable=True)
            self.write_scores()
            self.evaluator.forget_parts()
        self.train()
        if self.best_state is not None:
            self.trainer.load_weights(self.best_state)
            self.reporter.say(f"kept the best validation, at step {self.best['step']}: {100 * self.best['metric']:.1f}")
        self.save_adapter()
        # What a killed session answered counts if this one has the same weights: those of the last checkpoint.
        resumable = self.saved == (self.step, self.validated)
        if self.iterated:
            self.evaluator.forget_parts()
        self.evaluate("after", "after training, ", AFTER, resumable)
        self.answer_test(resumable)
        self.finish()
        self.evaluator.forget_parts()

    def train(self) -> None:
        """Iterations, with a validation and a checkpoint where they are due. Told to stop, it ends between two."""
        checkpoints = self.recipe.checkpoint.every_steps
        self.reporter.begin(self.last_step, self.step)
        try:
            if checkpoints and self.saved is None:
                self.save_checkpoint()  # what was evaluated before training is not evaluated again
            while True:
                if self._due(self.recipe.evaluation.every_steps) and self.validated < self.step:
                    self._validate()
                done = self.step >= self.last_step or self._stopped_early()
                new_best = self.step > 0 and self.best["step"] == self.step
                due = checkpoints and (done or new_best or self._due(checkpoints))
                if due and self.saved != (self.step, self.validated):
                    self.save_checkpoint()
                if done:
                    break
                if self.strategy.stopping():
                    raise signals.Stopped
                self._iterate()
        finally:
            self.reporter.end()

    def _due(self, every: int) -> bool:
        return bool(every) and self.step > 0 and self.step % every == 0

    def _iterate(self) -> None:
        start, self.iterated = time.monotonic(), True
        try:
            metrics, records = self.trainer.iterate(self.step)
        except BadNumber as bad:
            raise NumbersError(self._explained(bad)) from bad
        except UserError as error:  # a reward that is no number, on this rank alone
            with suppress(OSError):
                self._leave([Problem(f"reward: {error}", [], "")], None)
            raise
        self.step += 1
        self.seconds += time.monotonic() - start
        self._record(metrics | {"elapsed_s": self.seconds}, records)

    def _stopped_early(self) -> bool:
        patience = self.recipe.evaluation.patience
        return bool(patience) and self.best["since"] >= patience

    def _record(self, metrics: dict[str, Any], records: list[dict[str, Any]]) -> None:
        if self.folder is None:
            return
        self.folder.metrics(metrics)
        kept = records[: self.recipe.logging.rollout_samples]
        self.folder.append("rollouts.jsonl", [{"step": metrics["step"], **record} for record in kept])
        self.reporter.step(metrics)
        for warning in self.watch.step(metrics, records):
            self.reporter.warn(warning)

    def _validate(self) -> None:
        predictions = self.evaluator.predict(self.data.validation, f"at step {self.step}, validation split")
        scores = score_all(self.recipe.data.tasks, predictions, intervals=False)
        metric = mean_score(scores)
        better = self.best["metric"] is None or metric > self.best["metric"]
        if better:
            self.best = {"metric": metric, "step": self.step, "since": 0}
            self.best_state = self.trainer.weights()
        else:
            self.best["since"] += 1
        self.validated = self.step
        self.reporter.say(
            f"validation {100 * metric:.1f}"
            + (" (best so far)" if better else f" (best {100 * self.best['metric']:.1f} at step {self.best['step']})")
        )
        if self.folder is not None:
            record = {"step": self.step, "samples": self.samples, "seconds": self.seconds, "mean": metric}
            self.folder.append("validation.jsonl", [record | {"tasks": scores}])

    @property
    def samples(self) -> int:
        """Samples that were learned from."""
        return self.step * self.recipe.training_batch

    # ------------------------------------------------------------------------------------ numbers that are none

    def _explained(self, bad: BadNumber) -> str:
        """Leave the batch in the run folder, and say what was wrong with it; on every rank."""
        weights = self.trainer.weights()
        samples, _ = self.trainer.evidence()
        problems, folder, own = bad.problems, self._failed, []
        try:
            self._leave(problems, weights)
            problems = self._blamed(problems)
            self._leave(problems, weights)
        except OSError as error:
            own.append(f"  rank {self.strategy.rank}: its part of the batch could not be written ({error.strerror})")
        for problem in problems[:3]:  # in the order of the computation, so the cause comes first
            named = [f"{slot} ({samples[slot]['task']}, row {samples[slot]['index']})" for slot in problem.slots[:4]]
            more = f" and {len(problem.slots) - 4} more" if len(problem.slots) > 4 else ""
            own.append(
                f"  rank {self.strategy.rank}: {problem.found} in {problem.tensor}; sample {', '.join(named)}{more}"
            )
        if len(bad.problems) > 3:
            own.append(f"  rank {self.strategy.rank}: and then in {len(bad.problems) - 3} more tensors")
        found = "\n".join(line for part in self.strategy.gather(own) for line in part)
        return (
            f"step {self.step + 1}: numbers that are none, found before the update, so the weights are as they were:\n"
            f"{found}\nThe batch is in {folder}; look at it with: nlu replay {folder}\nWhat often helps: a lower "
            "optimizer.lr, model.dtype=float32, a smaller ppo.clip; with another recipe choose another output_dir"
        )

    def _blamed(self, problems: Sequence[Problem]) -> list[Problem]:
        """A gradient or loss is that of a whole micro-batch; find the samples whose own is not finite either."""
        of_batch = ("gradient", "loss")
        suspects = sorted({slot for p in problems if p.tensor.startswith(of_batch) for slot in p.slots})
        if self.strategy.stage == 3:  # there each forward is one of all ranks
            return list(problems)
        guilty = {slot for slot in suspects if self._is_bad(slot)}
        return [
            Problem(p.tensor, [s for s in p.slots if s in guilty] or p.slots, p.found)
            if p.tensor.startswith(of_batch)
            else p
            for p in problems
        ]

    def _is_bad(self, slot: int) -> bool:
        watchdog.progress()
        parameters = list(self.trainer.policy.trainable.values())
        for role, loss in self.trainer.losses_of(slot).items():
            with self.trainer.policy.role(role):
                value = loss()
                found = torch.autograd.grad(value, parameters, allow_unused=True)
            numbers = [value, *(gradient for gradient in found if gradient is not None)]
            if not all(bool(torch.isfinite(tensor).all()) for tensor in numbers):
                return True
        return False

    @property
    def _failed(self) -> Path:
        return self.recipe.run_dir / "failed" / f"step-{self.step + 1}"

    def _leave(self, problems: Sequence[Problem], weights: dict[str, Tensor] | None) -> None:
        samples, tensors = self.trainer.evidence()
        own = weights if self.strategy.is_rank_0() else None
        leave(self._failed, self.strategy.rank, problems, samples, tensors, own)

    # -------------------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(self) -> bool:
        """Write a resume point. False, with a warning, where the disk refuses.

        Raises:
            SaveError: it refuses, and the recipe says that the run then stops.
        """
        self._compare_ranks()
        state = {
            "step": self.step,
            "validated": self.validated,
            "seconds": self.seconds,
            "trainer": self.trainer.state(),
            "watch": self.watch.state(),
            "best": self.best,
            "scores": self.scores,
        }
        error = None
        if self.folder is not None:
            try:
                self.folder.sync()  # its lines up to here are there when the checkpoint is
            except OSError as refused:
                error = str(refused)
        error = self.strategy.gather(error)[0]
        if error is None:
            best_step = None if self.best["metric"] is None else self.best["step"]
            error = self.checkpoints.save(self.step, state, self.best_state, best_step)
        if error is None:
            self.saved = (self.step, self.validated)
            return True
        last = "there is none before it" if self.saved is None else f"that of step {self.saved[0]} is as it was"
        message = f"the checkpoint of step {self.step} could not be written ({error}); {last}"
        if self.recipe.checkpoint.on_error == "stop":
            raise SaveError(message)
        self.reporter.warn(f"{message}. The run goes on, unsaved; free some space")
        return False

    def _compare_ranks(self) -> None:
        """Warn where a rank's trained parameters are not those of the others, which no exchange would put right."""
        if self.strategy.world_size == 1 or self.strategy.stage == 3:  # under ZeRO 3 there is but one copy
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
                "the others, so the run no longer computes what its recipe says. Most often a faulty device, or a "
                "reward that answers otherwise on each rank; stop, and resume from a checkpoint before this one"
            )

    def resume(self) -> None:
        """Go on from the newest good checkpoint in the run folder, if there is one."""
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
        self.watch.load_state(state["watch"])
        self.saved = (self.step, self.validated)
        if self.folder is not None:
            self.folder.cut_back(self.step, self.validated)
            if "before" in self.scores:
                self.write_scores()
        self.reporter.say(f"resuming after step {self.step} from {checkpoint.folder}")

    # ------------------------------------------------------------------------------------------------- the end

    def save_adapter(self) -> None:
        """Before the last evaluations, which may take longer than the training."""
        state = self.trainer.weights() if self.best_state is None else self.best_state
        if self.folder is not None:
            temporary = self.folder.root / "adapter.tmp"
            self.trainer.save(temporary, self.folder.root / "critic", state)
            self.evaluator.encoder.tokenizer.save_pretrained(str(temporary))
            dtype = read_json(self.folder.root / "model.json")["dtype"]  # that the ranks computed in
            handover.write(temporary, handover.make(self.recipe, self.evaluator.encoder, dtype, self.evaluator.seen))
            move_into(temporary, self.folder.root / "adapter")

    def finish(self) -> None:
        """Scores, curve, card, table."""
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
        }
        self.folder.sync()
        metrics = read_jsonl(root / "metrics.jsonl")
        if recipe.method == "ppo":
            curve = root / "reward_curve.png"
            reward_curve(metrics, curve, f"{recipe.name}: PPO, {recipe.model.path}")
        else:
            curve = root / "loss_curve.png"
            loss_curve(metrics, curve, f"{recipe.name}: SFT, {recipe.model.path}")
        encoder, seen = self.evaluator.encoder, self.evaluator.seen
        done = (self.samples, self.step, self.seconds)
        card = model_card(recipe, self.scores, self.data.split, *done, encoder=encoder, seen=seen)
        write_text(root / "adapter" / "README.md", str(card))
        self.write_scores()  # last: with them the run is finished
        self.folder.close()
        self.reporter.say(
            f"{self.samples} samples in {self.step} iterations, {self.seconds / 60:.1f} minutes of training"
        )
        self.print_table()
        self.reporter.say(
            f"{curve.stem.replace('_', ' ')}: {curve}\nadapter:      {root / 'adapter'}\n"
            f"new rows:     nlu predict {root} new.csv --out answers.csv"
        )


def _method_of(adapter: str | None) -> str | None:
    """What made an adapter, if the recipe of its run stands beside it."""
    try:
        return load_recipe(Path(adapter).parent / "recipe.yaml").method if adapter is not None else None
    except UserError:
        return None


class SaveError(Exception):
    """A checkpoint could not be written, and the run is to stop then."""


class NumbersError(Exception):
    """NaN or infinity; the message says where."""


def _report(message: str, rank: str, status: int) -> int:
    """Print an error once. Most are the same on all ranks: rank 0 speaks, and the launcher then ends the others.

    A rank that is still there after some seconds has an error of its own, which nobody else would tell.
    """
    if rank != "0":
        told, end = signals.requested(), time.monotonic() + 5
        while time.monotonic() < end:
            time.sleep(0.1)
            if signals.requested() != told:  # by the launcher: rank 0 has said the same
                return status
        message = f"rank {rank}: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    return status


def _crash(error: Exception, rank: str) -> int:
    """An error that nobody foresaw. That of a collective is the echo of another rank's, which speaks first."""
    if _is_of_collective(error):
        time.sleep(5)
        print(
            f"error: rank {rank}: stopped, since another rank is gone ({' '.join(str(error).split())[:200]}). Its own "
            "error stands above, if it could still print one; a rank that is killed cannot, and that is mostly for "
            "lack of memory",
            file=sys.stderr,
            flush=True,
        )
    else:
        print(f"rank {rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    return 1


def _is_of_collective(error: Exception) -> bool:
    """Whether a collective failed because another rank did not take part to its end."""
    said = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(word in said for word in ("gloo", "nccl", "closed by peer", "socket"))
    )


def _is_full_disk(error: Exception) -> bool:
    """Whether a disk, or a user's share of it, is full; the writer of safetensors says so in words alone (0.8)."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)


def _stopped(method: str, arguments: Sequence[str], rank: str) -> int:
    if rank == "0":
        command = signals.command_line(method, arguments)
        print(f"stopped ({signals.requested() or 'another rank was told to'}); go on with: {command}", flush=True)
    return 0


def main(
    arguments: Sequence[str],
    method: str = "ppo",
    do: Callable[[Recipe], None] = run,
    script: str | None = None,
    set_by_script: Sequence[str] = (),
) -> int:
    """RECIPE [key.sub=value ...], as launch/METHOD.sh got them.

    Args:
        script: of launch/ that was started, if it is not called METHOD.
        set_by_script: overrides that it makes.

    Returns the exit status: 0 finished, or stopped as told; 1 crashed; 2 the user's to put right; 3 the disk is full;
    4 numbers that are none; 6 the rollout engine has other weights. (5, from `extensions.watchdog`: a rank hangs.)
    """
    with signals.caught():  # to the last word: the launcher gives the other ranks SIGTERM as soon as one has failed
        status = _main(arguments, method, do, script or method, set_by_script)
    if status:  # leaving the group well takes all ranks, and NCCL would wait for those that are still in a collective
        atexit.unregister(torch.distributed.destroy_process_group)
    return status


def _main(
    arguments: Sequence[str], method: str, do: Callable[[Recipe], None], script: str, set_by_script: Sequence[str]
) -> int:
    rank = os.environ.get("RANK", "0")
    try:
        if not arguments or arguments[0].startswith("-"):
            raise UserError(
                f"usage: {'bash' if script != method else 'deepspeed'} launch/{script}.sh RECIPE [key.sub=value ...]"
            )
        do(load_recipe(arguments[0], [*arguments[1:], *set_by_script], method))
    except signals.Stopped:
        return _stopped(script, arguments, rank)
    except UserError as error:
        return _report(str(error), rank, 2)
    except SaveError as error:
        return _report(f"{error}\nThen run the same command again: it resumes from the last checkpoint", rank, 3)
    except NumbersError as error:
        return _report(str(error), rank, 4)
    except ProcessGone as error:
        return _report(str(error), rank, 1)
    except SyncError as error:
        return _report(str(error), rank, 6)
    except Exception as error:
        if not _is_full_disk(error):
            return _crash(error, rank)
        place = getattr(error, "filename", None) or "while writing to the run folder"
        return _report(
            f"the disk is full ({place}); free some space, then run the same command again: it resumes from the last "
            "checkpoint",
            rank,
            3,
        )
    return 0
