"""RESULTS.md and its plots, from `results/*.csv` alone; with a folder of runs, that data is collected first.

python recipes/evidence/results.py runs/evidence     # collect the finished cells, then write
python recipes/evidence/results.py                   # write again from the data
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cells import DATA, HERE, Evidence, EvidenceCell, read_lines
from collect import DATA_ROOT, collect

from extensions.common.files import write_text
from extensions.reporting.plots import Curve, Level, Panel, accuracy_curves
from extensions.reporting.scores import NO_VALUE, cell_text, markdown_table, percent
from extensions.reporting.yardstick_lines import yardstick_name
from extensions.tasks import find_task

PAGE = HERE / "RESULTS.md"
PLOTS = {"sampled": "by sampled answers", "likelihood": "by likelihood"}
COLUMNS = [
    "Method",
    "Rows",
    "Sampled",
    "By likelihood",
    "Δ sampled",
    "Δ likelihood",
    "Wrong format",
    "ECE",
    "Log loss",
    "CPU s",
]
HEAD = """\
# Results

SmolLM2-135M-Instruct on GLUE and SuperGLUE tasks: what each method makes of the same labelled rows. This page and its
plots are written by `results.py` from `results/*.csv`; the cells are those of `cells.yaml`.

```bash
python recipes/evidence/run.py path/to/data            # all cells, one after the other; the same command continues
python recipes/evidence/run.py path/to/data --only '^sst2/ppo-576-seed0$'      # one cell, and those that it needs
python recipes/evidence/results.py runs/evidence       # collects the runs, writes this page and the plots
```

Scores are in percent: accuracy; Matthews' correlation for CoLA, Spearman's for STS-B. `Sampled` is one multinomial
response per row, a wrong format being wrong; `by likelihood` is the most probable of the task's answers. Means over
seeds, with 95% bootstrap intervals over the evaluation rows, which are the same for all methods of a task; they do not
hold the spread over seeds, which "By seed" shows. Δ is the paired difference to the method that the table names, in
bold where its interval excludes 0. `ECE` is the expected calibration error of the label probabilities. `CPU s` is the
processor time of the training alone, since the machine is shared and wall time varies. The command of each cell is in
`results/runs.csv`.
"""


class Results:
    """The data of `results/`, and the cells that it should have."""

    def __init__(self, content: Mapping[str, Any], cells: Sequence[EvidenceCell], data: Path) -> None:
        self.content, self.cells = content, cells
        self.runs = {line["cell"]: line for line in read_lines(data / "runs.csv")}
        self.means = {(*_setting(line), line["decoding"]): line for line in read_lines(data / "means.csv")}
        self.yardsticks = read_lines(data / "yardsticks.csv")

    # ------------------------------------------------------------------------------------------------------ the page

    def page(self) -> str:
        missing = [cell for cell in self.cells if cell.name not in self.runs]
        parts = [HEAD, *self._by_seed(), *self._notes(), *self._verdicts()]
        for decoding, name in PLOTS.items():
            if self.panels(decoding):
                parts.append(f"![Scores against rows and minutes, {name}](results/curves-{decoding}.png)\n")
        for table, entry in self.content["tables"].items():
            parts += [f"## {entry['title']}\n", f"{entry['note'].strip()} Δ: to {self._title(entry['against'])}.\n"]
            has_run = [cell for cell in self.cells if cell.table == table and cell.name in self.runs]
            if not has_run:
                parts.append("Not run yet.\n")
            for task in dict.fromkeys(cell.task for cell in has_run):
                parts += [f"### {self._heading(task)}\n", self._table(table, task)]
        parts += [
            "## Label shares\n",
            "In percent. `Parsers differ`: responses that `parser: strict` and `parser: paper` judge differently.\n",
            self._shares(),
        ]
        parts += ["## Runs\n", f"{len(self.cells) - len(missing)} of {len(self.cells)} cells have run.\n"]
        parts += [*self._machines()]
        if missing:
            tasks = dict.fromkeys(cell.task for cell in missing)
            names = {
                task: [f"`{cell.name.partition('/')[2]}`" for cell in missing if cell.task == task] for task in tasks
            }
            parts += ["Not run yet:\n", "\n".join(f"- {task}: {', '.join(of)}" for task, of in names.items()) + "\n"]
        return "\n".join(parts)

    def _notes(self) -> list[str]:
        """Findings that no table shows, in words of their own."""
        path = HERE / "FINDINGS.md"
        return [path.read_text(encoding="utf-8")] if path.exists() else []

    def _title(self, method: str) -> str:
        return str(self.content["methods"][method]["title"])

    def _heading(self, task: str) -> str:
        lines = [line for line in self.runs.values() if line["task"] == task]
        rows = f", {lines[0]['evaluated']} validation rows" if lines else ""
        return f"{find_task(task).display_name}{rows}"

    def _settings(self, table: str, task: str) -> list[EvidenceCell]:
        """The lines of a table: one cell of each, with those of the first table that it also shows."""
        also = self.content["tables"][table].get("also", ())
        own = [cell for cell in self.cells if cell.table == table and cell.task == task]
        beside = [cell for cell in self.cells if cell.table == "equal-rows" and cell.task == task]
        found = [*(cell for cell in beside if cell.method in also), *own]
        lines = list({_setting(cell): cell for cell in found}.values())
        order = list(self.content["methods"])
        return sorted(lines, key=lambda cell: (cell.rows, order.index(cell.method), cell.variant or ""))

    def _table(self, table: str, task: str) -> str:
        against, lines = self.content["tables"][table]["against"], []
        settings = self._settings(table, task)
        variants = len({cell.variant for cell in settings}) > 1
        for cell in settings:
            means = {decoding: self.means.get((*_setting(cell), decoding)) for decoding in PLOTS}
            runs = self._runs(cell)
            seeds = [run["seed"] for run in runs]
            label = self._title(cell.method) + (", all linear" if variants and cell.variant else "")
            prompting = self.content["methods"][cell.method]["script"] == "eval"
            lines.append([
                cell_text(label) + (f" (seeds {', '.join(seeds)})" if len(seeds) > 1 else ""),
                NO_VALUE if prompting else str(cell.rows),
                *(_interval(mean) for mean in means.values()),
                *(_difference(mean, against) for mean in means.values()),
                percent(_mean(runs, "wrong_format")),
                percent(_mean(runs, "ece")),
                NO_VALUE if (loss := _mean(runs, "log_loss")) is None else f"{loss:.2f}",
                NO_VALUE if (seconds := _mean(runs, "training_cpu_s")) is None else f"{seconds:.0f}",
            ])  # fmt: skip
        rows = dict.fromkeys(cell.rows for cell in settings)
        return markdown_table(COLUMNS, [*lines, *self._yardstick_rows(task, [*rows])])

    def _runs(self, cell: EvidenceCell) -> list[Mapping[str, str]]:
        """The runs of a setting that are in its means: earlier ones left no answers."""
        means = (self.means.get((*_setting(cell), decoding)) for decoding in PLOTS)
        seeds = next((mean["seeds"].split() for mean in means if mean is not None), None)
        return [run for run in self._all_runs(cell) if seeds is None or run["seed"] in seeds]

    def _all_runs(self, cell: EvidenceCell) -> list[Mapping[str, str]]:
        """The runs of a setting, by seed."""
        runs = (run for run in self.runs.values() if _setting(run) == _setting(cell))
        return sorted(runs, key=lambda run: int(run["seed"]))

    def _yardstick_rows(self, task: str, rows: Sequence[int]) -> Iterator[list[str]]:
        for count in rows:
            found = [line for line in self.yardsticks if (line["task"], line["rows"]) == (task, str(count))]
            for kind in dict.fromkeys(line["kind"] for line in found):
                lines = [line for line in found if line["kind"] == kind]
                value, low, high, seconds = (
                    _mean(lines, key) or 0.0 for key in ("value", "value_low", "value_high", "seconds")
                )
                score = _interval_text(value, low, high)
                name = yardstick_name(kind, find_task(task))
                dashes = [NO_VALUE] * 6
                yield [f"*{name}*", lines[0]["train_rows"], score, *dashes, f"{seconds:.1f}"]

    def _verdicts(self) -> list[str]:
        """Per task the methods that are above, and below, answer-only SFT at equal rows."""
        lines = []
        against = self.content["tables"]["equal-rows"]["against"]
        for task in dict.fromkeys(cell.task for cell in self.cells if cell.table == "equal-rows"):
            groups: dict[str, list[str]] = {"above": [], "below": [], "not distinguishable": []}
            for cell in self._settings("equal-rows", task):
                for decoding, name in PLOTS.items():
                    mean = self.means.get((*_setting(cell), decoding))
                    if mean is None or mean["against"] != against:
                        continue
                    low, high = float(mean["difference_low"]), float(mean["difference_high"])
                    word = "above" if low > 0 else "below" if high < 0 else "not distinguishable"
                    groups[word].append(f"{self._title(cell.method)} {name} ({100 * float(mean['difference']):+.1f})")
            if any(groups.values()):
                verdict = "; ".join(f"{word}: {', '.join(group) or 'none'}" for word, group in groups.items())
                lines.append(f"- {find_task(task).display_name}: {verdict}.")
        head = f"## Against {self._title(against)}\n\nAt equal rows, by the 95% interval of the paired difference:\n"
        return [head, "\n".join(lines) + "\n"] if lines else []

    def _by_seed(self) -> list[str]:
        """The scores of each seed, of the settings that ran with several."""
        lines = []
        for cell in {_setting(cell): cell for cell in self.cells}.values():
            runs = self._all_runs(cell)
            if len(runs) < 2:
                continue
            scores = [[percent(float(run[key])) for run in runs if run[key]] for key in PLOTS]
            columns = [", ".join(one) for one in [[run["seed"] for run in runs], *scores]]
            name = f"{find_task(cell.task).display_name}: {cell_text(self._title(cell.method))}"
            lines.append([name, str(cell.rows), *(text or NO_VALUE for text in columns)])
        heads = ["Method", "Rows", "Seeds", "Sampled", "By likelihood"]
        return ["## By seed\n", markdown_table(heads, lines)] if lines else []

    def _shares(self) -> str:
        lines = []
        for line in self.runs.values():
            texts = [_shares_text(json.loads(line[f"{kind}_shares"])) for kind in ("gold", *PLOTS)]
            lines.append([f"`{line['cell']}`", *texts, line["parsers_differ"] or NO_VALUE])
        heads = ["Cell", "Gold", "Sampled", "By likelihood", "Parsers differ"]
        return markdown_table(heads, lines, 4) if lines else "Not run yet.\n"

    def _machines(self) -> list[str]:
        found: dict[str, Counter[str]] = {}
        for line in self.runs.values():
            found.setdefault(f"{line['machine']}; {line['versions']}", Counter())[line["commit"]] += 1
        lines = [
            f"- {commits.total()} cells: {text}; commits {', '.join(f'{one} ({n})' for one, n in commits.items())}\n"
            for text, commits in found.items()
        ]
        return ["".join(lines)] if lines else []

    # ----------------------------------------------------------------------------------------------------- the plots

    def panels(self, decoding: str) -> list[Panel]:
        """Score against rows and against minutes of a processor, per task with several sizes."""
        panels = []
        for task in dict.fromkeys(cell.task for cell in self.cells if cell.table == "sizes"):
            settings, curves = self._settings("sizes", task), []
            for method in dict.fromkeys(cell.method for cell in settings):
                points = [p for cell in settings if cell.method == method and (p := self._point(cell, decoding))]
                if points:
                    curves.append(_curve(self._title(method), points))
            for kind in dict.fromkeys(line["kind"] for line in self.yardsticks if line["task"] == task):
                found = [line for line in self.yardsticks if (line["task"], line["kind"]) == (task, kind)]
                by_rows = {
                    line["rows"]: (float(line["rows"]), float(line["seconds"]), float(line["value"])) for line in found
                }
                curves.append(_curve(yardstick_name(kind, find_task(task)), sorted(by_rows.values())))
            if curves:
                panels.append(Panel(find_task(task).display_name, curves, self._levels(task, decoding)))
        return panels

    def _point(self, cell: EvidenceCell, decoding: str) -> tuple[float, float, float] | None:
        mean = self.means.get((*_setting(cell), decoding))
        seconds = _mean(self._runs(cell), "training_cpu_s")
        return None if mean is None or seconds is None else (float(cell.rows), seconds, float(mean["value"]))

    def _levels(self, task: str, decoding: str) -> dict[str, Level]:
        levels = {}
        for cell in self._settings("equal-rows", task):
            mean = self.means.get((*_setting(cell), decoding))
            if mean is not None and self.content["methods"][cell.method]["script"] == "eval":
                levels[self._title(cell.method)] = Level(
                    float(mean["value"]), (float(mean["low"]), float(mean["high"]))
                )
        return levels


def _curve(label: str, points: Sequence[tuple[float, float, float]]) -> Curve:
    rows, seconds, scores = map(list, zip(*points, strict=True))
    return Curve(label, rows, [one / 60 for one in seconds], scores, on_training=False)


def _setting(line: Mapping[str, str] | EvidenceCell) -> tuple[str, ...]:
    """What the runs of several seeds share."""
    if isinstance(line, EvidenceCell):
        return line.task, line.method, str(line.rows), line.variant or "", line.seconds_of or ""
    return line["task"], line["method"], line["rows"], line["variant"], line["seconds_of"]


def _mean(lines: Sequence[Mapping[str, str]], key: str) -> float | None:
    """Of the lines that have the number."""
    numbers = [float(line[key]) for line in lines if line[key]]
    return sum(numbers) / len(numbers) if numbers else None


def _interval(mean: Mapping[str, str] | None) -> str:
    if mean is None:
        return NO_VALUE
    return _interval_text(*(float(mean[key]) for key in ("value", "low", "high")))


def _interval_text(value: float, low: float, high: float) -> str:
    return f"{percent(value)} [{100 * low:.0f}, {100 * high:.0f}]"


def _difference(mean: Mapping[str, str] | None, against: str) -> str:
    """In bold if its interval excludes 0."""
    if mean is None or mean["against"] != against:
        return NO_VALUE
    change, low, high = (100 * float(mean[key]) for key in ("difference", "difference_low", "difference_high"))
    text = f"{change:+.1f} [{low:.0f}, {high:.0f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def _shares_text(shares: Mapping[str, float]) -> str:
    return cell_text(", ".join(f"{word} {percent(share)}" for word, share in shares.items())) or NO_VALUE


def write(results: Results, page: Path) -> None:
    """The page, and the plots in `results/` beside it."""
    write_text(page, results.page())
    for decoding in PLOTS:
        if panels := results.panels(decoding):
            (page.parent / "results").mkdir(exist_ok=True)
            accuracy_curves(panels, page.parent / "results" / f"curves-{decoding}.png")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="?", help="folder of the runs, --out of run.py")
    args = parser.parse_args(arguments)
    evidence = Evidence.load(Path(DATA_ROOT), args.runs or Path("runs/evidence"))
    if args.runs is not None:
        if not args.runs.is_dir():
            print(f"{args.runs} is not a folder; give --out of run.py", file=sys.stderr)
            return 2
        print(f"{collect(evidence)} of {len(evidence.cells)} cells are finished in {args.runs}")
    write(Results(evidence.content, evidence.cells, DATA), PAGE)
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
