"""Tables behind the result tables, in Markdown: intervals, label bias, training costs, PPO's time against SFT's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from extensions.evaluation.metrics import WRONG_FORMAT
from extensions.reporting.finished_runs import FinishedRun
from extensions.reporting.rows import Result, Row
from extensions.reporting.scores import NO_VALUE, cell_text, interval_text, markdown_table, percent
from extensions.reporting.tables import PAPER
from extensions.reporting.yardstick_lines import rows_text, yardstick_name


def interval_table(rows: Sequence[Row]) -> str:
    """Every metric of every row with its 95% interval; of the answers by likelihood too, where runs have them."""
    lines, likely = [], _has_likelihood(rows)
    for row, result in _results(rows):
        other = result.by_likelihood
        for metric, value in result.score.metrics.items():
            cells = map(cell_text, (row.name, result.task.display_name, metric, result.split))
            intervals = [interval_text(metric, value, result.score.intervals[metric])]
            if other is not None and metric in other.metrics:
                intervals.append(interval_text(metric, other.metrics[metric], other.intervals[metric]))
            elif likely:
                intervals.append(NO_VALUE)
            lines.append([*cells, *intervals, str(result.score.samples)])
    heads = ["Value [95%]", *(["By likelihood [95%]"] if likely else []), "Samples"]
    return markdown_table(["Row", "Task", "Metric", "Split", *heads], lines, 4)


def bias_table(rows: Sequence[Row]) -> str | None:
    """Shares of the answers against those of the gold labels; None without a task with labels."""
    lines, likely = [], _has_likelihood(rows)
    for row, result in _results(rows):
        gold, predicted = result.score.gold_shares, result.score.predicted_shares
        excess = {word: predicted.get(word, 0.0) - share for word, share in gold.items() if word != WRONG_FORMAT}
        if not excess:
            continue
        shares = [f"{word} {percent(predicted.get(word, 0.0))} ({percent(share)})" for word, share in gold.items()]
        other = result.by_likelihood.predicted_shares if result.by_likelihood else {}
        others = ", ".join(f"{word} {percent(share)}" for word, share in other.items()) or NO_VALUE
        largest = max(excess, key=lambda word: abs(excess[word]))
        texts = (row.name, result.task.display_name, ", ".join(shares), *([others] if likely else []))
        wrong = percent(result.score.format_error_rate)
        lines.append([*map(cell_text, texts), wrong, f"{100 * excess[largest]:+.1f} ({cell_text(largest)})"])
    heads = ["Row", "Task", "Predicted (gold)", *(["By likelihood"] if likely else [])]
    return markdown_table([*heads, "Wrong format", "Largest deviation"], lines, len(heads)) if lines else None


def parser_table(rows: Sequence[Row]) -> str | None:
    """Responses that the two parsers judge differently; None without one."""
    lines = [
        [
            cell_text(row.name),
            cell_text(result.task.display_name),
            str(result.score.parsers_differ),
            str(result.score.samples),
        ]
        for row, result in _results(rows)
        if result.score.parsers_differ
    ]
    return markdown_table(["Row", "Task", "Judged differently", "Samples"], lines, 2) if lines else None


def yardstick_table(rows: Sequence[Row]) -> str | None:
    """Scores of simple models beside those of each row, as far as its runs have them; None without one."""
    lines, likely = [], _has_likelihood(rows)
    for row, result in _results(rows):
        for kind, scores in result.run.scores.yardsticks.items():
            if (found := scores.get(result.task.name)) is not None:
                names = (row.name, result.task.display_name, yardstick_name(kind, result.task))
                numbers = [percent(found.score), percent(result.score.score)]
                numbers += [percent(result.by_likelihood.score if result.by_likelihood else None)] if likely else []
                lines.append([*map(cell_text, names), *numbers, rows_text(found.model_dump()), f"{found.seconds:.1f}"])
    heads = ["Its score", "The row's", *(["By likelihood"] if likely else []), "Training rows", "Seconds"]
    return markdown_table(["Row", "Task", "Yardstick", *heads], lines, 3) if lines else None


def cost_table(rows: Sequence[Row]) -> str | None:
    """Samples and time per training; None without a training."""
    lines = []
    for row, run in _trainings(rows):
        training, best = run.training, run.seconds_to_best
        numbers = (
            f"{training.steps}",
            f"{training.samples}",
            f"{training.seconds:.0f}",
            NO_VALUE if training.seconds_per_sample is None else f"{training.seconds_per_sample:.3f}",
            NO_VALUE if best is None else f"{best:.0f}",
        )
        lines.append([cell_text(row.name), cell_text(run.trained_titles), *numbers])
    header = ["Row", "Trained on", "Steps", "Samples", "Seconds", "Seconds per sample", "Seconds to best validation"]
    return markdown_table(header, lines, 2) if lines else None


def time_ratio_table(rows: Sequence[Row]) -> str | None:
    """Training time of PPO over that of SFT, for pairs of one model and the same tasks; None without such a pair."""
    lines = []
    for (row, ppo), (other, sft) in product(_trainings(rows), repeat=2):
        above, below = ppo.training, sft.training
        same = row.model == other.model and sorted(above.tasks) == sorted(below.tasks)
        if (ppo.recipe.method, sft.recipe.method) == ("ppo", "sft") and same:
            ratios = (
                _ratio(above.seconds_per_sample, below.seconds_per_sample),
                _ratio(above.seconds, below.seconds),
                _ratio(ppo.seconds_to_best, sft.seconds_to_best),
            )
            lines.append([*map(cell_text, (row.name, other.label, ppo.trained_titles)), *ratios])
    if not lines:
        return None
    lines.append(["The paper (LLAMA2-7B, GLUE)", "SFT", "", "", str(PAPER["ppo_over_sft_time"]), ""])
    return markdown_table(["PPO", "over", "Trained on", "Per sample", "Whole training", "To best validation"], lines, 3)


def _results(rows: Sequence[Row]) -> list[tuple[Row, Result]]:
    return [(row, result) for row in rows for result in row.results.values()]


def _has_likelihood(rows: Sequence[Row]) -> bool:
    return any(result.by_likelihood for _, result in _results(rows))


def _trainings(rows: Sequence[Row]) -> list[tuple[Row, FinishedRun]]:
    return [(row, run) for row in rows for run in row.runs if run.training.tasks]


def _ratio(above: float | None, below: float | None) -> str:
    return NO_VALUE if above is None or not below else f"{above / below:.2f}"
