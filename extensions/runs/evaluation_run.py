"""The base class of runs, and the evaluation of a model, adapter or prompt form without training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from extensions.common.console import Reporter
from extensions.common.files import write_json
from extensions.data import Example
from extensions.data.splits import RunData
from extensions.distributed import watchdog
from extensions.distributed.strategy import Strategy
from extensions.evaluation.evaluator import Evaluator
from extensions.evaluation.metrics import score_all
from extensions.evaluation.yardsticks import compute_yardsticks
from extensions.recipe import Recipe
from extensions.reporting.scores import before_after_table, own_class_tables
from extensions.reporting.yardstick_lines import comparison_lines, print_yardsticks
from extensions.runs.answer_health import unpredicted_warnings
from extensions.runs.folder import RunFolder

AFTER = "predictions_after.jsonl"
TEST = "predictions_test.jsonl"  # read by `nlu submit`


class Run:
    """Scores and answers of a run. The folder is None except on rank 0."""

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
        self.scores: dict[str, Any] = {"method": recipe.method, "decoding": recipe.evaluation.decoding}
        self.scores |= {"split": data.split, "splits": data.splits}

    def evaluate(self, moment: str, when: str, file: str, resumable: bool = False) -> None:
        """Answer and score the rows of the evaluation table. Call it on every rank."""
        title = f"{when}{self.data.split} split"
        predictions = self.evaluator.predict(self.data.table, title, file, resumable)
        self.scores[moment] = score_all(self.recipe.data.tasks, predictions)
        if moment == "after":
            for text in unpredicted_warnings(self.recipe.data.tasks, self.scores[moment], title, self.recipe.method):
                self.reporter.warn(text)

    def compute_yardsticks(self, train: Sequence[Example]) -> None:
        """Score simple models of training rows on the rows of the table. Call it on every rank."""
        tasks = self.recipe.data.tasks
        self.reporter.phase("computing yardsticks")
        found = compute_yardsticks(tasks, train, self.data.table, self.recipe.seed, self.strategy)
        self.scores["yardsticks"] = found
        print_yardsticks(tasks, found, self.reporter)

    def answer_test(self, resumable: bool = False) -> None:
        if self.data.test:
            title = "of the test splits, for nlu submit"
            self.evaluator.predict(self.data.test, title, TEST, resumable, probabilities=False)

    def write_scores(self) -> None:
        if self.folder is not None:
            write_json(self.folder.root / "eval.json", self.scores)

    def print_table(self) -> None:
        tasks, scores = self.recipe.data.tasks, self.scores
        yardsticks, after = scores.get("yardsticks", {}), scores["after"]
        table = before_after_table(tasks, scores.get("before"), after, self.data.split, yardsticks)
        self.reporter.console.print(table, *own_class_tables(tasks, after))
        print_yardsticks(tasks, yardsticks, self.reporter)
        for line in comparison_lines(tasks, yardsticks, after, self.recipe.evaluation.decoding):
            self.reporter.info(line)


class EvaluationRun(Run):
    """Evaluation of a model, adapter or prompt form (paper 5.2). A killed run resumes after its last batch."""

    def go(self) -> None:
        start = time.monotonic()
        with watchdog.watching(self.strategy.rank, self.recipe.deepspeed.timeout):
            self.evaluate("after", "", AFTER, resumable=True)
            self.answer_test(resumable=True)
        if self.recipe.is_merged:
            self.scores["merged"] = True
        self.write_scores()
        self.evaluator.remove_parts()
        if self.folder is not None:
            self.folder.write_page(running=False)
            self.folder.close()
            self.reporter.info(f"{time.monotonic() - start:.0f} seconds")
            self.print_table()
            self.reporter.info(
                f"scores:  {self.folder.root / 'eval.json'}\nanswers: {self.folder.root / AFTER}\n"
                f"page:    {self.folder.root / 'report.html'}"
            )
