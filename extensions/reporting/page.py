"""report.html of a run: one self-contained file that reads its folder, finished or not."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from extensions.common.files import write_text
from extensions.evaluation.metrics import WRONG_FORMAT, unanswered
from extensions.prompts import prompt_text
from extensions.recipe import dump_recipe
from extensions.reporting import charts, run_charts, task_view
from extensions.reporting.charts import Chart
from extensions.reporting.run_view import Moment, RunView, conclusions, duration, read_view
from extensions.reporting.scores import NOT_IN_PERCENT, change_text, metric_text
from extensions.tasks import Task

PAGE = "report.html"
NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # what neither HTML nor UTF-8 can hold
# Special tokens as the families of models write them.
SPECIAL = re.compile(r"(<\|[^|<>\s]{1,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:bos|eos|pad|start_of_turn|end_of_turn)>)")
METRIC_TITLES = {"mae": "MAE", "rmse": "RMSE", "r2": "R²", "f1": "F1", "f1a": "F1a", "f1_macro": "Macro F1"} | {
    "f1_micro": "Micro F1",
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "squad_f1": "F1",
    "squad_em": "Exact match",
}
ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


def write_page(folder: Path, last_step: int | None = None, running: bool | None = None) -> Path:
    """Write report.html of a run folder. Arguments and errors as in `read_view`.

    Returns:
        The file.
    """
    write_text(folder / PAGE, run_page(read_view(folder, last_step, running)))
    return folder / PAGE


def run_page(view: RunView) -> str:
    """The page of one run."""
    tasks = [TaskPart(view, task) for task in view.tasks]
    return render(
        "page_run.html.j2",
        title=view.recipe.name,
        view=view,
        tasks=tasks,
        conclusions=conclusions(view),
        overview=run_charts.overview_chart(view),
        training=run_charts.training_charts(view),
        details=run_charts.detail_charts(view),
        prompt=prompt_of(view),
        recipe_yaml=dump_recipe(view.recipe),
    )


class TaskPart:
    """One task of a run's page. The template reads the attributes; None or empty: the part is left out."""

    def __init__(self, view: RunView, task: Task) -> None:
        self.task, self.split = task, view.split_of(task.name)
        self.moments = view.moments(task)
        by_kind = {moment.kind: moment for moment in self.moments}
        self.before = by_kind.get("before")
        self.after = by_kind.get("after") or by_kind.get("latest") or self.before
        self.likelihood = by_kind.get("likelihood")
        self.yardsticks = [m for m in self.moments if m.path.startswith("yardsticks/")]
        self.metrics = list(self.after.result["metrics"]) if self.after else []
        self.never = unanswered(self.after.result) if self.after else []
        self.errors = task_view.error_list(view, task)
        self.changes = task_view.changes(view, task)
        self.histories = task_view.histories(view, task)
        chances = {f"row {h['index']}: {h['gold']}": h["chances"] for h in self.histories if len(h["chances"]) > 1}
        self.chances = charts.chances_chart(chances) if chances else None
        self.shares = run_charts.shares_chart(view, task)
        self.rollouts = task_view.rollout_samples(view, task)
        self.confusions = [
            (moment.title, charts.confusion_chart(moment.title, moment.result["confusion"]), moment)
            for kind in ("after", "latest", "likelihood", "before", "tfidf", "embeddings")
            if (moment := by_kind.get(kind)) and moment.result.get("confusion")
        ]
        calibrated = [
            m for m in (by_kind.get("after"), self.before) if m and m.result.get("calibration", {}).get("bins")
        ]
        self.calibrations = [
            (m, charts.reliability_chart(m.title, m.result["calibration"]["bins"])) for m in calibrated
        ]
        self.classes = self._classes(by_kind)
        self.scatter = self._scatter(view)

    def _classes(self, by_kind: dict[str, Moment]) -> list[dict[str, Any]]:
        """Per class: precision, recall, F1 and support after, F1 before, shares; by word."""
        after = by_kind.get("after") or by_kind.get("latest")
        if after is None or not after.result.get("classes"):
            return []
        old = self.before.result.get("classes", {}) if self.before else {}
        gold, predicted = (after.result.get(f"{name}_shares", {}) for name in ("gold", "predicted"))
        return [
            {
                "word": word,
                "path": f"{after.path}/classes/{word}",
                "old_path": f"before/{self.task.name}/classes/{word}",
                "old": old.get(word),
                "gold": gold.get(word),
                "predicted": predicted.get(word),
                **numbers,
            }
            for word, numbers in after.result["classes"].items()
        ]

    def _scatter(self, view: RunView) -> Chart | None:
        if self.task.score_range is None:
            return None
        found = {moment: task_view.points(view, self.task, moment) for moment in ("before", "after")}
        shown = {moment: points for moment, points in found.items() if points}
        return charts.score_chart("Answers against gold scores", shown, self.task.score_range) if shown else None


def prompt_of(view: RunView) -> dict[str, Any] | None:
    """A prompt as the model sees it and, where known, a response; None where the folder does not tell.

    From a training rollout, else made from the fields of an answered row, if the form needs no tokenizer.
    """
    for record in view.records("rollouts.jsonl"):
        if record.get("prompt"):
            return {
                "source": f"training rollout, step {record['step']}, task {record['task']}, row {record['index']}",
                "prompt": record["prompt"],
                "response": record.get("response"),
            }
    form = view.recipe.prompt
    if form.chat_template or form.shots or view.recipe.method == "encoder":
        return None
    for moment in ("after", "before"):
        for task in view.tasks:
            for line in view.predictions(moment, task.name)[:1]:
                if set(task.fields) <= line["fields"].keys():
                    return {
                        "source": f"row {line['index']} of {task.display_name}, {view.split_of(task.name)} split",
                        "prompt": prompt_text(task, {name: str(text) for name, text in line["fields"].items()}),
                        "response": line["response"],
                    }
    return None


# ------------------------------------------------------------------------------------------------------ rendering


def render(template: str, **values: Any) -> str:
    """A template as a whole page: style, scripts and data inlined; nothing is loaded from elsewhere."""
    data: dict[str, Any] = {"figures": {}, "errors": {}}

    def add_figure(chart: Chart) -> str:
        key = f"chart-{len(data['figures'])}"
        data["figures"][key] = chart.figure
        return key

    def add_errors(errors: dict[str, Any]) -> str:
        key = f"errors-{len(data['errors'])}"
        data["errors"][key] = errors
        return key

    scripts = [_plotly(), _resource("page.js")]
    html = (
        _environment()
        .get_template(template)
        .render(
            values,
            add_figure=add_figure,
            add_errors=add_errors,
            data_json=lambda: Markup(embedded_json(data)),  # nosec B704 # escaped there
            style=Markup(_resource("page.css")),  # nosec B704 # the project's own, as are the scripts
            scripts=[Markup(script) for script in scripts],  # nosec B704
            hashes=" ".join(f"'sha256-{_sha256(script)}'" for script in scripts),
        )
    )
    return NOT_TEXT.sub("\ufffd", html)


def embedded_json(data: Any) -> str:
    """JSON for a script element: no character in it can end the element or begin markup."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(ESCAPES)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("extensions.reporting", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals |= {"wrong_format": WRONG_FORMAT, "not_in_percent": NOT_IN_PERCENT}
    environment.filters["metric_title"] = lambda name: METRIC_TITLES.get(name, name.replace("_", " ").capitalize())
    environment.filters["number"] = lambda value, metric="": metric_text(metric, value)
    environment.filters["change_text"] = change_text
    environment.filters["duration"] = duration
    environment.filters["tokens"] = visible_tokens
    return environment


def visible_tokens(text: str) -> Markup:
    """A prompt with its special tokens marked and its trailing spaces visible."""
    parts = SPECIAL.split(text)
    marked = [Markup("<mark>{}</mark>").format(part) if i % 2 else Markup.escape(part) for i, part in enumerate(parts)]
    lines = Markup("").join(marked)
    spaces = re.sub(r" +(?=\n|$)", lambda found: "<i>·</i>" * len(found[0]), str(lines))
    return Markup(spaces)  # nosec B704 # its parts are escaped above


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs  # lazy: 0.1 s

    return str(get_plotlyjs())


@cache
def _resource(name: str) -> str:
    return files("extensions.reporting").joinpath(name).read_text(encoding="utf-8")


@cache
def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
