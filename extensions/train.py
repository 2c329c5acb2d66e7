"""A run, from a recipe to a run folder: data, model, engine, evaluations, checkpoints, adapter, report.

The training itself is a trainer's (`extensions.ppo`, `extensions.sft`), the answers are the evaluator's
(`extensions.evaluate`); here is everything around them.
"""

from __future__ import annotations

import errno
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from extensions.data import BatchOrder, rows_of_epoch
from extensions.errors import UserError
from extensions.evaluate import Evaluator
from extensions.loop import Trainer
from extensions.metrics import mean_score, score_all
from extensions.plots import loss_curve, reward_curve
from extensions.policy import load_policy, load_tokenizer, prompt_limit
from extensions.ppo import PpoTrainer
from extensions.prompts import CLOSE, PromptEncoder
from extensions.recipe import Recipe, load_recipe
from extensions.report import before_after_table, model_card
from extensions.rewards import load_reward
from extensions.rollout import Sampler
from extensions.run import (
    CollapseWatch,
    Reporter,
    RunFolder,
    newest_checkpoint,
    prune_checkpoints,
    read_json,
    read_jsonl,
    write_json,
)
from extensions.run_data import RunData
from extensions.sft import SftTrainer
from extensions.strategy import Strategy, load_trainable_state, trainable_state
from extensions.tasks import Task

AFTER = "predictions_after.jsonl"
TEST = "predictions_test.jsonl"  # what `nlu submit` reads


def run(recipe: Recipe) -> None:
    """Do what a recipe's method says and write its run folder, on this rank."""
    prepare(recipe).go()


def prepare(recipe: Recipe) -> Evaluation | Training:
    """Everything of a run but the work itself: data, model, engine, run folder.

    What can be wrong in the recipe's data, reward or folder is found before the model is loaded.
    """
    method, ppo = recipe.method, recipe.ppo
    strategy = Strategy(
        recipe.seed, recipe.deepspeed, recipe.sft.max_grad_norm if method == "sft" else ppo.max_grad_norm
    )
    strategy.setup_distributed()
    reporter = Reporter(active=strategy.is_rank_0())
    if not (reporter.active and sys.stderr.isatty()):
        transformers.utils.logging.disable_progress_bar()
    _check_ranks(recipe, strategy.world_size)
    reward = load_reward(recipe.reward)
    data = RunData.load(recipe, reporter.warn)
    tokenizer = load_tokenizer(recipe.model)
    folder = RunFolder(recipe.run_dir, recipe) if strategy.is_rank_0() else None
    if folder is not None and folder.set_aside is not None:
        reporter.say(f"an earlier run was moved to {folder.set_aside}")
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
    )
    encoder = PromptEncoder(
        tokenizer,
        prompt_limit(recipe, policy.causal_lm.config),
        recipe.prompt.chat_template,
        recipe.prompt.shots,
        data.demonstrations,
    )
    for example in (*data.train, *data.table, *data.validation, *data.test):
        encoder.check(example.task, example.fields)  # a prompt that cannot fit stops the run here
    for task in recipe.data.tasks if recipe.evaluation.decoding != "likelihood" else []:
        _check_budget(task, encoder, recipe.rollout.max_new_tokens, reporter)
    sharded = recipe.deepspeed.zero_stage == 3
    engine, steps = None, recipe.training_steps(len(data.train))
    if method != "eval" or sharded:
        engine = strategy.wrap(policy, recipe.trained_with, recipe.schedule, _updates(recipe, steps))
    lockstep = recipe.rollout.max_new_tokens if sharded else None
    sampler = Sampler(policy, tokenizer, recipe.evaluation.micro_batch_size, lockstep)
    evaluator = Evaluator(recipe, strategy, reporter, sampler, encoder, recipe.run_dir)
    if method == "eval":
        return Evaluation(recipe, strategy, reporter, folder, data, evaluator)
    order = BatchOrder(
        data.train, recipe.training_batch, recipe.seed, recipe.data.balanced, _rows_of_epoch(recipe, data)
    )
    trainer: Trainer
    if method == "sft":
        trainer = SftTrainer(policy, engine, strategy, encoder, order, recipe.sft, recipe.seed)
    else:
        budget = (recipe.rollout.min_new_tokens, recipe.rollout.max_new_tokens)
        sampler = Sampler(policy, tokenizer, ppo.micro_batch_size, lockstep)
        trainer = PpoTrainer(policy, engine, strategy, sampler, encoder, reward, order, ppo, *budget, recipe.seed)
    return Training(recipe, strategy, reporter, folder, data, evaluator, trainer, steps)


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


def _check_budget(task: Task, encoder: PromptEncoder, budget: int, reporter: Reporter) -> None:
    """Warn where a right answer is longer than what may be sampled: it would be cut, a wrong format each time."""
    words = [words[0] for words in task.labels.values()]
    tokens = {word: len(encoder.tokenizer(f"{word}{CLOSE}", add_special_tokens=False)["input_ids"]) for word in words}
    longest = max(tokens, key=lambda word: tokens[word], default=None)
    if longest is not None and tokens[longest] > budget:
        reporter.warn(
            f"{task.display_name}: the answer {longest!r} and the closing tag are {tokens[longest]} tokens, more than "
            f"rollout.max_new_tokens: {budget}; raise that, or no sampled answer can be right"
        )


def _updates(recipe: Recipe, steps: int) -> int:
    """Optimizer steps of the whole run, of `steps` iterations."""
    if recipe.method == "sft":
        return steps
    ppo = recipe.ppo
    return steps * ppo.epochs * (ppo.batch_size // (ppo.mini_batch_size or ppo.batch_size))


def _rows_of_epoch(recipe: Recipe, data: RunData) -> dict[str, int]:
    settings, sizes = recipe.data, Counter(example.task.name for example in data.train)
    return rows_of_epoch(sizes, settings.mixing, settings.mixing_cap, settings.mixing_temperature)


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
        self.trainer, self.policy, self.last_step = trainer, trainer.policy, steps
        self.best: dict[str, Any] = {"metric": None, "step": 0, "since": 0}
        self.best_state: dict[str, Tensor] | None = None
        self.collapse = CollapseWatch()
        self.step = 0
        self.seconds = 0.0  # of training, over all sessions

    def go(self) -> None:
        self.resume()
        if self.folder is not None:
            self.folder.start_trackers(self.recipe)
        if self.recipe.evaluation.before and "before" not in self.scores:
            self.evaluate("before", "before training, ", "predictions_before.jsonl")
            self.write_scores()
        self.train()
        if self.best_state is not None:
            load_trainable_state(self.policy, self.best_state)
            self.reporter.say(f"kept the best validation, at step {self.best['step']}: {100 * self.best['metric']:.1f}")
        self.save_adapter()
        self.evaluate("after", "after training, ", AFTER)
        self.answer_test()
        self.finish()

    def train(self) -> None:
        recipe = self.recipe
        self.reporter.begin(self.last_step, self.step)
        while self.step < self.last_step and not self._stopped_early():
            start = time.monotonic()
            metrics, records = self.trainer.iterate(self.step)
            self.step += 1
            self.seconds += time.monotonic() - start
            self._record(metrics | {"elapsed_s": self.seconds}, records)
            if recipe.evaluation.every_steps and self.step % recipe.evaluation.every_steps == 0:
                self._validate()
            if recipe.checkpoint.every_steps and self.step % recipe.checkpoint.every_steps == 0:
                self.save_checkpoint()
        self.reporter.end()

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
        for task in self.recipe.data.tasks:
            if not task.is_regression:
                own = [
                    (task.answer(r["answer"]), task.answer(r["gold"]))
                    for r in records
                    if r["task"] == task.name and r["answer"] is not None
                ]
                warning = self.collapse.add(task.name, own)
                if warning:
                    self.reporter.warn(warning)

    def _validate(self) -> None:
        predictions = self.evaluator.predict(self.data.validation, f"at step {self.step}, validation split")
        scores = score_all(self.recipe.data.tasks, predictions, intervals=False)
        metric = mean_score(scores)
        better = self.best["metric"] is None or metric > self.best["metric"]
        if better:
            self.best = {"metric": metric, "step": self.step, "since": 0}
            self.best_state = trainable_state(self.policy)
        else:
            self.best["since"] += 1
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

    # -------------------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(self) -> None:
        """Write a resume point; its folder gets its final name only once it is complete."""
        root = self.recipe.run_dir / "checkpoints"
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "trainer": self.trainer.state(),
            "best": self.best,
            "world_size": self.strategy.world_size,
        }
        tag = f"writing-{self.step}"
        self.trainer.engine.save_checkpoint(str(root), tag=tag, save_latest=False, exclude_frozen_parameters=True)
        if self.folder is not None:
            write_json(root / tag / "run.json", state)
            if self.best_state is not None:
                torch.save(self.best_state, root / tag / "best.pt")
            (root / tag).replace(root / f"step-{self.step}")
            prune_checkpoints(self.folder.root, self.recipe.checkpoint.keep)
        self.strategy.barrier()

    def resume(self) -> None:
        """Go on from the newest checkpoint in the run folder, if there is one."""
        checkpoint = newest_checkpoint(self.recipe.run_dir)
        if checkpoint is None:
            return
        state = read_json(checkpoint / "run.json")
        if state["world_size"] != self.strategy.world_size:
            raise UserError(
                f"{checkpoint} was written by {state['world_size']} ranks, this run has {self.strategy.world_size}; "
                "start as many, or choose another output_dir"
            )
        self.trainer.engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name, load_module_strict=False)
        self.step, self.seconds, self.best = state["step"], state["seconds"], state["best"]
        self.trainer.load_state(state["trainer"])
        if (checkpoint / "best.pt").exists():
            self.best_state = torch.load(checkpoint / "best.pt", weights_only=True)
        if self.folder is not None:
            self.folder.cut_back(self.step)
        if (self.recipe.run_dir / "eval.json").exists():
            self.scores = read_json(self.recipe.run_dir / "eval.json")
        self.reporter.say(f"resuming after step {self.step} from {checkpoint}")

    # ------------------------------------------------------------------------------------------------- the end

    def save_adapter(self) -> None:
        """Before the last evaluations, which may take longer than the training."""
        state = trainable_state(self.policy)
        if self.folder is not None:
            self.policy.save_adapter(self.folder.root / "adapter", state)
            self.evaluator.encoder.tokenizer.save_pretrained(str(self.folder.root / "adapter"))
            self.policy.save_critic(self.folder.root / "critic", state)

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
        self.write_scores()
        metrics = read_jsonl(root / "metrics.jsonl")
        if recipe.method == "ppo":
            curve = root / "reward_curve.png"
            reward_curve(metrics, curve, f"{recipe.name}: PPO, {recipe.model.path}")
        else:
            curve = root / "loss_curve.png"
            loss_curve(metrics, curve, f"{recipe.name}: SFT, {recipe.model.path}")
        card = model_card(recipe, self.scores, self.data.split, self.samples, self.step, self.seconds)
        card.save(root / "adapter" / "README.md")
        self.folder.close()
        self.reporter.say(
            f"{self.samples} samples in {self.step} iterations, {self.seconds / 60:.1f} minutes of training"
        )
        self.print_table()
        self.reporter.say(f"{curve.stem.replace('_', ' ')}: {curve}\nadapter:      {root / 'adapter'}")


def _method_of(adapter: str | None) -> str | None:
    """What made an adapter, if the recipe of its run stands beside it."""
    try:
        return load_recipe(Path(adapter).parent / "recipe.yaml").method if adapter is not None else None
    except UserError:
        return None


def _report(message: str, rank: str, status: int) -> int:
    """Print an error once. Most are the same on all ranks: rank 0 speaks, and the launcher then ends the others.

    A rank that is still there after some seconds has an error of its own, which nobody else would tell.
    """
    if rank != "0":
        time.sleep(5)
        message = f"rank {rank}: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    return status


def _crash(rank: str) -> int:
    print(f"rank {rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    return 1


def main(arguments: Sequence[str], method: str = "ppo", do: Callable[[Recipe], None] = run) -> int:
    """RECIPE [key.sub=value ...], as launch/METHOD.sh got them. Returns the exit status."""
    rank = os.environ.get("RANK", "0")
    try:
        if not arguments or arguments[0].startswith("-"):
            raise UserError(f"usage: deepspeed launch/{method}.sh RECIPE [key.sub=value ...]")
        do(load_recipe(arguments[0], arguments[1:], method))
    except UserError as error:
        return _report(str(error), rank, 2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return _crash(rank)
        return _report(
            f"the disk is full ({error.filename or 'while writing to the run folder'}); free some space, then run the "
            "same command again: it resumes from the last checkpoint",
            rank,
            3,
        )
    except Exception:
        return _crash(rank)
    return 0
