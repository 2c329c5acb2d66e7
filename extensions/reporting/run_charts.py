"""Which charts a run's page has, and the numbers in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from extensions.reporting.charts import (
    BLUE,
    COLORS,
    GREY,
    Chart,
    Mark,
    Series,
    color,
    overview,
    raw_and_smoothed,
    training_chart,
)
from extensions.reporting.run_view import YARDSTICKS, RunView, yardstick_title
from extensions.tasks import Task

MAX_SHARES = 8  # labels in a chart of label shares; the others are added up
MARKS = {  # kind of a result -> mark, colour, size
    "majority": ("line-ns-open", GREY, 14),
    "tfidf": ("diamond-open", COLORS[1], 11),
    "embeddings": ("square-open", COLORS[3], 10),
    "before": ("circle-open", GREY, 11),
    "likelihood": ("x-thin-open", COLORS[2], 9),
    "latest": ("circle", BLUE, 11),
    "after": ("circle", BLUE, 12),
}
NAMES = {"before": "before", "likelihood": "by likelihood", "latest": "latest validation"}
Value = Callable[[dict[str, Any]], float | None]


def overview_chart(view: RunView) -> Chart | None:
    """Before, after and yardsticks of every task; None without a result."""
    found: dict[str, dict[str, float]] = {}
    intervals: dict[str, dict[str, Sequence[float]]] = {}
    for task in view.tasks:
        for moment in view.moments(task):
            found.setdefault(moment.kind, {})[task.display_name] = moment.score
            interval = moment.interval(task.metrics[0]) if len(task.metrics) == 1 else None
            if interval and moment.kind == "after":
                intervals.setdefault(moment.kind, {})[task.display_name] = interval
    after = "after" if "before" in view.scores else "score"
    if not found:
        return None
    names = NAMES | {kind: yardstick_title(kind, view.tasks) for kind in YARDSTICKS}
    marks = [
        Mark((names | {"after": after})[kind], symbol, shade, found[kind], intervals.get(kind, {}), size)
        for kind, (symbol, shade, size) in MARKS.items()
        if kind in found
    ]
    return overview(
        [task.display_name for task in view.tasks if any(task.display_name in m.values for m in marks)], marks
    )


def training_charts(view: RunView) -> list[Chart]:
    """The curves of a training: what matters most comes first."""
    charts = [_scores(view), _rewards(view), _task_scores(view), _wrong_formats(view)]
    charts += [_losses(view), *(_metric(view, *one) for one in METRICS)]
    return [chart for chart in charts if chart is not None]


METRICS = (  # key, title, unit, note
    ("kl", "KL to the reference", "nats per response", ""),
    ("entropy", "Entropy of the policy", "nats per token", "near 0: the policy always gives the same answer"),
    ("policy_loss", "Policy loss", "", ""),
    ("value_loss", "Value loss", "", ""),
    ("correlation", "Correlation with the gold scores", "", "within each batch, before its update"),
    ("kl_loss", "KL loss", "nats per token", ""),
    (
        "equal_groups",
        "Prompts whose responses have equal rewards",
        "share",
        "they teach nothing",
    ),
)
DETAILS = (
    ("clip_fraction", "Clipped tokens", "share", ""),
    ("grad_norm", "Gradient norm", "", ""),
    ("lr", "Learning rate", "", ""),
    ("kl_coef", "KL coefficient", "", ""),
    ("response_tokens", "Response length", "tokens", ""),
    ("samples_per_s", "Speed", "samples per second", ""),
)


def detail_charts(view: RunView) -> list[Chart]:
    charts = (_metric(view, *one) for one in DETAILS)
    return [chart for chart in charts if chart is not None]


def series_of(
    records: Sequence[dict[str, Any]], name: str, value: Value, shade: str = BLUE, style: str = "line"
) -> Series:
    """A value per record; records without it are left out. Lines of metrics.jsonl and validation.jsonl."""
    kept = [(record, number) for record in records if (number := value(record)) is not None]
    return Series(
        name,
        [record["samples"] for record, _ in kept],
        [(record["elapsed_s"] if "elapsed_s" in record else record["seconds"]) / 60 for record, _ in kept],
        [number for _, number in kept],
        [record["step"] for record, _ in kept],
        shade,
        style,
    )


def at(*keys: str) -> Value:
    """Reads the number at nested keys of a record; None if there is none."""

    def value(record: dict[str, Any]) -> float | None:
        found: Any = record
        for key in keys:
            found = (found or {}).get(key)
        return found

    return value


def _metric(view: RunView, key: str, title: str, unit: str, note: str) -> Chart | None:
    one = series_of(view.iterations, "", at(key))
    if len(set(one.values)) < 2:
        return None
    return training_chart(title, raw_and_smoothed(one), unit, note=note)


def _losses(view: RunView) -> Chart | None:
    names, unit = {"loss": "all target tokens", "answer_loss": "answer tokens"}, "nats per token"
    if view.recipe.method == "sft" and view.recipe.sft.loss == "correlation":
        names, unit = {"loss": "loss"}, ""
    found = [series_of(view.iterations, n, at(key), color(i)) for i, (key, n) in enumerate(names.items())]
    if view.recipe.method == "encoder":
        unit = "nats"
        found = [
            series_of(
                [r for r in view.iterations if r.get("task") == t.name],
                t.display_name,
                at("loss"),
                color(i),
            )
            for i, t in enumerate(view.tasks)
        ]
    series = [line for one in found if one.values for line in raw_and_smoothed(one)]
    return training_chart("Loss", series, unit) if series else None


def _rewards(view: RunView) -> Chart | None:
    mean = series_of(view.iterations, "mean" if len(view.tasks) > 1 else "", at("reward_mean"))
    if not mean.values:
        return None
    series = raw_and_smoothed(mean)
    names = dict.fromkeys(name for record in view.iterations for name in record.get("reward_by_task", {}))
    titles = {task.name: task.display_name for task in view.recipe.data.tasks}
    for i, name in enumerate(names if len(names) > 1 else ()):
        one = series_of(view.iterations, titles.get(name, name), at("reward_by_task", name), color(i + 1))
        series.append(raw_and_smoothed(one)[-1])
    return training_chart("Reward", series, "reward", note="of the training rollouts; smoothed over raw")


def _scores(view: RunView) -> Chart | None:
    """Validation scores with what the evaluations before and after reached, and the yardsticks as levels."""
    if view.recipe.method == "encoder":  # its validations are of one task each
        return None
    series = [
        series_of(view.validations, "validation", at("mean"), BLUE, "marks"),
        series_of(view.likelihood_validations, "validation, by likelihood", at("likelihood_mean"), COLORS[2], "dash"),
    ]
    accuracy = series_of(view.iterations, "training accuracy", at("accuracy"), COLORS[6])
    if accuracy.values:
        series.append(raw_and_smoothed(accuracy)[-1])
    if not any(one.values for one in series):
        return None
    series += _ends(view)
    means = _means(view)
    levels = {yardstick_title(kind, view.tasks): means[kind] for kind in YARDSTICKS if kind in means}
    note = ", ".join(dict.fromkeys(f"{name}: {view.split_of(name)} split" for name in view.scores.get("after", {})))
    if len(view.tasks) > 1 or not note:
        note = "mean over the tasks"
    return training_chart(
        "Score",
        [one for one in series if one.values],
        levels=levels,
        note=f"circles: before and after ({note})",
        percent=True,
    )


def _means(view: RunView) -> dict[str, float]:
    """Mean score per kind of result that every task has."""
    found: dict[str, list[float]] = {}
    for task in view.tasks:
        for moment in view.moments(task):
            found.setdefault(moment.kind, []).append(moment.score)
    return {kind: sum(scores) / len(scores) for kind, scores in found.items() if len(scores) == len(view.tasks)}


def _ends(view: RunView) -> Iterator[Series]:
    """The evaluations before and after, at the ends of the training."""
    means, training = _means(view), view.training
    if "before" in means:
        yield Series("before", [0], [0.0], [means["before"]], [0], GREY, "point")
    if "after" in means:
        minutes = training["seconds"] / 60
        yield Series("after", [training["samples"]], [minutes], [means["after"]], [training["steps"]], BLUE, "point")


def _task_scores(view: RunView) -> Chart | None:
    if len(view.tasks) < 2:
        return None

    series = [
        series_of(view.validations, t.display_name, at("tasks", t.name, "score"), color(i), "marks")
        for i, t in enumerate(view.tasks)
    ]
    series = [one for one in series if one.values]
    return training_chart("Validation score per task", series, percent=True) if series else None


def _wrong_formats(view: RunView) -> Chart | None:
    rollouts = series_of(view.iterations, "training rollouts", at("format_error_rate"))

    def mean(record: dict[str, Any]) -> float | None:
        found = [result["format_error_rate"] for result in record.get("tasks", {}).values()]
        rates = [rate for rate in found if rate is not None]  # a ranked task has none
        return sum(rates) / len(rates) if rates else None

    validations = series_of(view.validations, "validation", mean, COLORS[1], "marks")
    if view.recipe.method == "encoder" or not any((*rollouts.values, *validations.values)):
        return None
    series = (raw_and_smoothed(rollouts) if rollouts.values else []) + ([validations] if validations.values else [])
    return training_chart("Answers of wrong format", series, percent=True)


def shares_chart(view: RunView, task: Task) -> Chart | None:
    """Shares of a task's answers: of the training rollouts, else of the validations; None for a regression."""
    if task.is_regression:
        return None
    prefix = f"{task.name}: " if len(view.recipe.data.tasks) > 1 else ""
    rollouts = [
        (record, shares)
        for record in view.iterations
        if (
            shares := {
                k.removeprefix(prefix): v for k, v in record.get("predicted_shares", {}).items() if k.startswith(prefix)
            }
        )
    ]
    found = rollouts or [
        (r, r["tasks"][task.name].get("predicted_shares", {}))
        for r in view.validations
        if task.name in r.get("tasks", {})
    ]
    if len(found) < 2:
        return None
    totals: dict[str, float] = {}
    for _, shares in found:
        for word, share in shares.items():
            totals[word] = totals.get(word, 0.0) + share
    ordered = list(totals) if len(totals) <= MAX_SHARES else sorted(totals, key=lambda word: -totals[word])
    shown, others = ordered[:MAX_SHARES], ordered[MAX_SHARES:]
    rest = f"{len(others)} other labels"
    records = [
        record
        | {"shares": {word: shares.get(word, 0.0) for word in shown} | {rest: sum(shares[word] for word in others)}}
        for record, shares in ((r, dict.fromkeys(totals, 0.0) | s) for r, s in found)
    ]
    colors = {word: color(i) for i, word in enumerate(shown)} | ({rest: GREY} if others else {})
    lines = [series_of(records, word, at("shares", word), shade) for word, shade in colors.items()]
    where = "training rollouts, smoothed" if rollouts else "validations"
    series = [raw_and_smoothed(one)[-1] for one in lines] if rollouts else lines
    return training_chart("Label shares", series, note=f"answers of the {where}", percent=True)
