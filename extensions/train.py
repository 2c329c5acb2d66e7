"""A run, from a recipe to a run folder: data, model, engine, evaluations, checkpoints, adapter, report.

The training itself is the trainer's (`extensions.ppo`); here is everything around it.
"""

from __future__ import annotations

import errno
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import transformers
from torch import Tensor

from extensions.data import BatchOrder, Example
from extensions.errors import UserError
from extensions.evaluate import predict
from extensions.metrics import Prediction, mean_score, score_all
from extensions.policy import load_policy, load_tokenizer, prompt_limit
from extensions.ppo import PpoTrainer
from extensions.prompts import PromptEncoder
from extensions.recipe import Ppo, Recipe, load_recipe
from extensions.report import before_after_table, model_card, reward_curve
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
from extensions.strategy import Strategy, load_trainable_state, trainable_state


def run(recipe: Recipe) -> None:
    """Train, evaluate and write the run folder of a recipe, on this rank.

    Everything that can be wrong in the recipe's data, reward or folder is found before the model is loaded.
    """
    strategy = Strategy(recipe.seed, recipe.deepspeed, recipe.ppo.max_grad_norm)
    strategy.setup_distributed()
    reporter = Reporter(active=strategy.is_rank_0())
    if not (reporter.active and sys.stderr.isatty()):
        transformers.utils.logging.disable_progress_bar()
    _check_ranks(recipe.ppo, strategy.world_size)
    reward = load_reward(recipe.reward)
    data = RunData.load(recipe, reporter.warn)
    tokenizer = load_tokenizer(recipe.model)
    folder = RunFolder(recipe.run_dir, recipe) if strategy.is_rank_0() else None
    if folder is not None and folder.set_aside is not None:
        reporter.say(f"an earlier run was moved to {folder.set_aside}")
    reporter.say(f"{recipe.name}: {data.describe()}; loading {recipe.model.path}")

    policy = load_policy(
        recipe.model, recipe.lora, recipe.ppo.critic, recipe.rollout.temperature, strategy.device, recipe.seed
    )
    encoder = PromptEncoder(tokenizer, prompt_limit(recipe, policy.causal_lm.config), recipe.prompt.chat_template)
    for example in (*data.train, *data.table, *data.validation, *data.test):
        encoder.check(example.task, example.fields)  # a prompt that cannot fit stops the run here
    updates = (
        recipe.max_steps
        * recipe.ppo.epochs
        * (recipe.ppo.batch_size // (recipe.ppo.mini_batch_size or recipe.ppo.batch_size))
    )
    engine = strategy.wrap(policy, recipe.optimizer, recipe.schedule, updates)
    lockstep = recipe.rollout.max_new_tokens if recipe.deepspeed.zero_stage == 3 else None
    sampler = Sampler(policy, tokenizer, recipe.ppo.micro_batch_size, lockstep)
    trainer = PpoTrainer(
        policy,
        engine,
        strategy,
        sampler,
        encoder,
        reward,
        BatchOrder(data.train, recipe.ppo.batch_size, recipe.seed, recipe.data.balanced),
        recipe.ppo,
        recipe.rollout.min_new_tokens,
        recipe.rollout.max_new_tokens,
        recipe.seed,
    )
    Run(recipe, strategy, reporter, folder, data, trainer).go()


def _check_ranks(ppo: Ppo, world_size: int) -> None:
    for key, value in (("ppo.batch_size", ppo.batch_size), ("ppo.mini_batch_size", ppo.mini_batch_size)):
        if value is not None and value % world_size:
            raise UserError(
                f"{key}: {value} samples cannot be shared evenly by {world_size} ranks; use a multiple of {world_size}"
            )


class Run:
    """A run from its first evaluation to its model card. Rank 0 alone has a folder."""

    def __init__(
        self,
        recipe: Recipe,
        strategy: Strategy,
        reporter: Reporter,
        folder: RunFolder | None,
        data: RunData,
        trainer: PpoTrainer,
    ) -> None:
        self.recipe, self.strategy, self.reporter, self.folder, self.data = recipe, strategy, reporter, folder, data
        self.trainer, self.policy = trainer, trainer.policy
        self.scores: dict[str, Any] = {"split": data.split}
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
            self.scores["before"] = self.evaluate(
                self.data.table, f"before training, {self.data.split} split", "predictions_before.jsonl"
            )
            self._write_scores()
        self.train()
        if self.best_state is not None:
            load_trainable_state(self.policy, self.best_state)
            self.reporter.say(f"kept the best validation, at step {self.best['step']}: {100 * self.best['metric']:.1f}")
        self.scores["after"] = self.evaluate(
            self.data.table, f"after training, {self.data.split} split", "predictions_after.jsonl"
        )
        if self.data.test:
            self.predict(self.data.test, "of the test splits, for nlu submit", "predictions_test.jsonl")
        self.finish()

    def train(self) -> None:
        recipe = self.recipe
        self.reporter.begin(recipe.max_steps, self.step)
        while self.step < recipe.max_steps and not self._stopped_early():
            start = time.monotonic()
            metrics, records = self.trainer.iterate(self.step)
            self.step += 1
            self.seconds += time.monotonic() - start
            self._record(metrics, records)
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

    # --------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, examples: list[Example], title: str, file: str) -> dict[str, dict[str, Any]]:
        """Scores by task, on every rank."""
        return score_all(self.recipe.data.tasks, self.predict(examples, title, file))

    def predict(self, examples: list[Example], title: str, file: str | None = None) -> list[Prediction]:
        """An answer to each example, on every rank; each rank samples its share of each task."""
        strategy, recipe = self.strategy, self.recipe
        self.reporter.say(f"evaluating {len(examples)} rows {title}")
        found: list[Prediction] = []
        done = 0

        def progress(rows: int) -> None:
            nonlocal done
            done += rows
            self.reporter.progress(done * strategy.world_size, len(examples))

        self.reporter.progress(0, len(examples))
        for task in recipe.data.tasks:
            rows = [example for example in examples if example.task.name == task.name]
            share = -(-len(rows) // strategy.world_size)
            own = rows[strategy.rank * share : (strategy.rank + 1) * share]
            if self.trainer.sampler.lockstep:
                own += rows[:1] * (share - len(own))  # as many forwards on each rank
            if own:
                found += predict(
                    own,
                    self.trainer.encoder,
                    self.trainer.sampler,
                    recipe.evaluation.batch_size,
                    recipe.rollout.max_new_tokens,
                    recipe.seed,
                    progress,
                )
        by_key = {(p.task, p.index): p for part in strategy.gather(found) for p in part}
        predictions = [by_key[example.task.name, example.index] for example in examples]
        if self.folder is not None and file is not None:
            (self.folder.root / file).unlink(missing_ok=True)
            self.folder.append(file, [asdict(prediction) for prediction in predictions])
        return predictions

    def _validate(self) -> None:
        predictions = self.predict(self.data.validation, f"at step {self.step}, validation split")
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
            self.folder.append("validation.jsonl", [{"step": self.step, "mean": metric, "tasks": scores}])

    def _write_scores(self) -> None:
        if self.folder is not None:
            write_json(self.folder.root / "eval.json", self.scores)

    # -------------------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(self) -> None:
        """Write a resume point; its folder gets its final name only once it is complete."""
        root = self.recipe.run_dir / "checkpoints"
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "kl_coef": self.trainer.kl_controller.value,
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
        self.strategy.barrier()  # rank 0 has set up the folder
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
        self.trainer.kl_controller.value = state["kl_coef"]
        if (checkpoint / "best.pt").exists():
            self.best_state = torch.load(checkpoint / "best.pt", weights_only=True)
        if self.folder is not None:
            self.folder.cut_back(self.step)
        if (self.recipe.run_dir / "eval.json").exists():
            self.scores = read_json(self.recipe.run_dir / "eval.json")
        self.reporter.say(f"resuming after step {self.step} from {checkpoint}")

    # ------------------------------------------------------------------------------------------------- the end

    def finish(self) -> None:
        """Adapter, curve, card, table."""
        state = trainable_state(self.policy)
        if self.folder is None:
            return
        root, recipe = self.folder.root, self.recipe
        self.policy.save_adapter(root / "adapter", state)
        self.trainer.encoder.tokenizer.save_pretrained(str(root / "adapter"))
        self.policy.save_critic(root / "critic", state)
        self._write_scores()
        metrics = read_jsonl(root / "metrics.jsonl")
        reward_curve(metrics, root / "reward_curve.png", f"{recipe.name}: PPO, {recipe.model.path}")
        model_card(
            recipe, self.scores, self.data.split, self.step * recipe.ppo.batch_size, self.step, self.seconds
        ).save(root / "adapter" / "README.md")
        self.folder.close()
        self.reporter.say(
            f"{self.step * recipe.ppo.batch_size} samples in {self.step} iterations, "
            f"{self.seconds / 60:.1f} minutes of training"
        )
        self.reporter.console.print(
            before_after_table(recipe.data.tasks, self.scores.get("before"), self.scores["after"], self.data.split)
        )
        self.reporter.say(f"reward curve: {root / 'reward_curve.png'}\nadapter:      {root / 'adapter'}")


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


def main(arguments: Sequence[str], method: str = "ppo") -> int:
    """RECIPE [key.sub=value ...], as launch/METHOD.sh got them. Returns the exit status."""
    rank = os.environ.get("RANK", "0")
    try:
        if not arguments or arguments[0].startswith("-"):
            raise UserError(f"usage: deepspeed launch/{method}.sh RECIPE [key.sub=value ...]")
        run(load_recipe(arguments[0], arguments[1:], method))
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
