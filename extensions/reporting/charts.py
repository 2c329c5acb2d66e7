"""The figures of report.html, as plotly's JSON.

They are plain dictionaries, made in a hundredth of the time of plotly's classes; a test has these classes check them.
The series colours have a contrast of at least 3 to 1 on the light and on the dark background. All else (text, grid,
hover) is coloured by page.css, so that a page follows the reader's theme, and prints light.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from extensions.reporting.plots import smoothed, smoothing_weight

COLORS = (
    *("#3d7dd9", "#d9730d", "#0f9d8a", "#9a63d8", "#d9485f"),
    *("#7f8c1d", "#c2569b", "#1f97c4", "#a0714f", "#7d8590"),
)
BLUE, GREY = COLORS[0], COLORS[-1]
SHADES = [[0, "rgba(61,125,217,0)"], [1, "rgba(61,125,217,0.9)"]]  # of the confusion matrix: transparent to blue
MAX_COUNTS = 15  # labels up to which a confusion matrix has its counts written in
MIN_SPAN = 20  # percentage points that an axis shows at least
MAX_LABEL = 22  # characters of a label beside an axis


@dataclass(frozen=True)
class Series:
    """A line of a chart over training: one value per step. Steps without a value are left out."""

    name: str
    samples: Sequence[float]
    minutes: Sequence[float]
    values: Sequence[float]
    steps: Sequence[int]
    color: str = BLUE
    style: str = "line"  # line, raw (pale, behind), dash, marks, point (a single mark)


@dataclass(frozen=True)
class Chart:
    """A figure and what stands above it."""

    title: str
    figure: dict[str, Any]
    note: str = ""
    width: int = 0  # at least, in pixels: narrower screens scroll
    extra: Mapping[str, Any] = field(default_factory=dict)


def color(i: int) -> str:
    return COLORS[i % len(COLORS)]


def _figure(height: int, xaxis: dict[str, Any], yaxis: dict[str, Any], **layout: Any) -> dict[str, Any]:
    """A figure without traces."""
    axis = {"automargin": True, "zeroline": False}
    look = {
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "itemwidth": 30},
        "hoverlabel": {"font": {"family": "system-ui, sans-serif", "size": 12}, "namelength": -1},
    }
    return {"data": [], "layout": {**look, "xaxis": axis | xaxis, "yaxis": axis | yaxis, **layout}}


def _add(figure: dict[str, Any], kind: str, **trace: Any) -> None:
    figure["data"].append({"type": kind, **trace})


# -------------------------------------------------------------------------------------------------- over training


def training_chart(
    title: str,
    series: Sequence[Series],
    unit: str = "",
    levels: Mapping[str, float] | None = None,
    note: str = "",
    percent: bool = False,
) -> Chart:
    """Lines against samples, which the page's script switches to minutes.

    Args:
        levels: name -> value that a dotted horizontal line marks.
        percent: values are fractions, shown in percent.
    """
    scale, decimals = (100, ".1f") if percent else (1, ".4g")
    names = [*(one.name for one in series), *(levels or {})]
    columns = max(1, 430 // (46 + 7 * max(map(len, names), default=0)))  # of the legend, about
    figure = _figure(
        240 + 19 * -(-len(names) // columns),
        hovermode="x unified",
        xaxis={"title": {"text": "training samples", "standoff": 6}, "rangemode": "tozero", "hoverformat": ".6~g"},
        yaxis={"title": {"text": "%" if percent else unit}},
    )
    looks: dict[str, dict[str, Any]] = {
        "line": {"mode": "lines", "line": {"width": 2.2}},
        "raw": {"mode": "lines", "line": {"width": 1}, "opacity": 0.35},
        "dash": {"mode": "lines+markers", "line": {"width": 1.8, "dash": "dash"}, "marker": {"size": 5}},
        "marks": {"mode": "lines+markers", "line": {"width": 2.2}, "marker": {"size": 6}},
        "point": {"mode": "markers", "marker": {"size": 11, "symbol": "circle-open", "line": {"width": 2.5}}},
    }
    for one in series:
        look = {key: dict(value) if isinstance(value, dict) else value for key, value in looks[one.style].items()}
        for part in {"line", "marker"} & look.keys():
            look[part]["color"] = one.color
        _add(
            figure,
            "scatter",
            x=list(one.samples),
            y=[scale * value for value in one.values],
            customdata=list(one.steps),
            name=inert(one.name),
            meta={"samples": list(one.samples), "minutes": [round(m, 4) for m in one.minutes]},
            hovertemplate=f"%{{y:{decimals}}} (step %{{customdata}})",
            cliponaxis=False,
            **look,
        )
    ends = [
        max((max(getattr(one, axis)) for one in series if one.values), default=1) for axis in ("samples", "minutes")
    ]
    for i, (name, level) in enumerate((levels or {}).items()):
        _add(
            figure,
            "scatter",
            x=[0, ends[0]],
            y=[scale * level] * 2,
            name=inert(name),
            mode="lines",
            line={"width": 1.6, "dash": "dot", "color": color(len(COLORS) - 1 - i)},
            meta={"samples": [0, ends[0]], "minutes": [0, ends[1]]},
            hovertemplate=f"%{{y:{decimals}}}",
        )
    if percent:
        found = [100 * value for one in series for value in one.values] + [
            100 * level for level in (levels or {}).values()
        ]
        figure["layout"]["yaxis"]["range"] = percent_range(found)
    return Chart(title, figure, note)


def percent_range(values: Sequence[float]) -> list[float]:
    """The range of an axis in percent: at least `MIN_SPAN` points, so that noise does not look like a change."""
    low, high = min(values, default=0.0), max(values, default=100.0)
    missing = max(0.0, MIN_SPAN - (high - low)) / 2
    low, high = low - missing, high + missing
    low, high = (low - max(0.0, high - 100), high) if low >= 0 else (low, high)
    pad = 0.06 * (high - low)
    return [max(low, min(0.0, min(values, default=0.0))) - pad, min(high, 100.0) + pad]


def raw_and_smoothed(one: Series) -> list[Series]:
    """A noisy series as two lines: as it is, and smoothed over about a tenth of the run."""
    if len(one.values) < 3:
        return [replace(one, style="marks")]
    smooth = smoothed(one.values, smoothing_weight(len(one.values)))
    raw = replace(one, name=f"{one.name}, raw" if one.name else "raw", style="raw")
    return [raw, replace(one, name=one.name or "smoothed", values=smooth)]


# ------------------------------------------------------------------------------------------------------ at the end


@dataclass(frozen=True)
class Mark:
    """A result in the overview: one kind of mark, a value per task."""

    name: str
    symbol: str
    color: str
    values: Mapping[str, float]  # title of a task -> score, 0 to 1
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    size: int = 11


def overview(titles: Sequence[str], marks: Sequence[Mark], apart: bool = False) -> Chart:
    """Before, after and yardsticks: a row of marks per task.

    Args:
        apart: the marks of a task one below the other.
    """
    figure = _figure(
        96 + (24 + 16 * len(marks) if apart else 40) * len(titles) + 20 * len(marks),  # a legend of one column
        hovermode="closest",
        xaxis={"title": {"text": "score, %"}, "showgrid": True},
        yaxis={"range": [len(titles) - 0.5, -0.5], "showgrid": True, **_ticks(titles)},
    )
    for i, mark in enumerate(marks):
        shift = (i - (len(marks) - 1) / 2) * 0.7 / len(marks) if apart else 0.0
        present = [title for title in titles if title in mark.values]
        values = [100 * mark.values[title] for title in present]
        ends = [[100 * end for end in mark.intervals.get(title, [mark.values[title]] * 2)] for title in present]
        texts = [f" [{low:.1f}, {high:.1f}]" if mark.intervals else "" for low, high in ends]
        _add(
            figure,
            "scatter",
            x=values,
            y=[titles.index(title) + shift for title in present],
            name=inert(mark.name),
            mode="markers",
            marker={
                "symbol": mark.symbol,
                "size": mark.size,
                "color": mark.color,
                "line": {"width": 2.2, "color": mark.color},
            },
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [high - value for value, (_, high) in zip(values, ends, strict=True)],
                "arrayminus": [value - low for value, (low, _) in zip(values, ends, strict=True)],
                "color": mark.color,
                "thickness": 2,
                "width": 5,
                "visible": bool(mark.intervals),
            },
            customdata=list(zip(map(inert, present), texts, strict=True)),
            hovertemplate=f"%{{customdata[0]}}: {inert(mark.name)} %{{x:.1f}}%{{customdata[1]}}<extra></extra>",
        )
    shown = [value for mark in marks for value in mark.values.values()]
    shown += [end for mark in marks for interval in mark.intervals.values() for end in interval]
    figure["layout"]["xaxis"]["range"] = percent_range([100 * value for value in shown])
    return Chart("Score per task", figure, width=340)


def confusion_chart(title: str, confusion: Mapping[str, Any]) -> Chart:
    """Gold labels against answers: counts, coloured by their share of the gold label's rows."""
    labels, counts = confusion["labels"], confusion["counts"]
    columns = [*labels, "wrong format"][: len(counts[0])]
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    few = len(labels) <= MAX_COUNTS
    cell = 42 if few else 19
    figure = _figure(
        150 + cell * len(labels),
        hovermode="closest",
        xaxis={"title": {"text": "answer"}, "side": "bottom", "showgrid": False, **_ticks(columns, -40)},
        yaxis={"title": {"text": "gold"}, "autorange": "reversed", "showgrid": False, **_ticks(labels)},
    )
    _add(
        figure,
        "heatmap",
        z=shares,
        zmin=0,
        zmax=1,
        colorscale=SHADES,
        showscale=False,
        xgap=2,
        ygap=2,
        text=counts,
        texttemplate="%{text}" if few else "",
        textfont={"size": 13},
        customdata=[[[gold, answer, inert(gold), inert(answer)] for answer in columns] for gold in labels],
        hovertemplate="gold: %{customdata[2]}<br>answer: %{customdata[3]}<br>%{text} rows, %{z:.1%} of the gold label"
        "<extra></extra>",
    )
    return Chart(title, figure, width=190 + (46 if few else 17) * len(columns), extra={"confusion": True})


def _ticks(labels: Sequence[str], angle: int = 0) -> dict[str, Any]:
    texts = [shortened(label) for label in labels]
    return {"tickmode": "array", "tickvals": list(range(len(labels))), "ticktext": texts, "tickangle": angle}


def inert(text: str) -> str:
    """A label or name without plotly's own markup (<b>, <a href>, %{y})."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("%{", "% {")


def shortened(label: str) -> str:
    return inert(label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 1]}…")


def reliability_chart(title: str, bins: Sequence[Mapping[str, float]]) -> Chart:
    """Accuracy against confidence per bin; the area of a mark grows with its rows."""
    largest = max(one["count"] for one in bins)
    figure = _figure(
        330,
        hovermode="closest",
        xaxis={"title": {"text": "confidence"}, "range": [-0.03, 1.03], "tickformat": ".0%"},
        yaxis={"title": {"text": "accuracy"}, "range": [-0.05, 1.05], "tickformat": ".0%"},
    )
    diagonal = {"dash": "dot", "width": 1.6, "color": GREY}
    _add(figure, "scatter", x=[0, 1], y=[0, 1], name="calibrated", mode="lines", hoverinfo="skip", line=diagonal)
    _add(
        figure,
        "scatter",
        x=[one["confidence"] for one in bins],
        y=[one["accuracy"] for one in bins],
        name="bins of rows",
        mode="lines+markers",
        line={"color": BLUE, "width": 1.6},
        marker={"color": BLUE, "size": [6 + 18 * (one["count"] / largest) ** 0.5 for one in bins], "opacity": 0.85},
        customdata=[[one["low"], one["high"], one["count"]] for one in bins],
        hovertemplate="confidence %{customdata[0]:.0%} to %{customdata[1]:.0%}: %{customdata[2]} rows<br>"
        "mean confidence %{x:.1%}, accuracy %{y:.1%}<extra></extra>",
    )
    return Chart(title, figure)


def score_chart(title: str, points: Mapping[str, Sequence[tuple[float, float, int]]], span: Sequence[float]) -> Chart:
    """Answers of a regression against gold scores.

    Args:
        points: name -> (gold, answer, row).
        span: lowest and highest score of the task.
    """
    low, high = span
    pad = 0.04 * (high - low)
    figure = _figure(
        400,
        hovermode="closest",
        xaxis={"title": {"text": "gold"}, "range": [low - pad, high + pad]},
        yaxis={"title": {"text": "answer"}, "range": [low - pad, high + pad]},
    )
    colors = {"before": GREY, "after": BLUE}
    for name, found in points.items():
        _add(
            figure,
            "scatter",
            x=[gold for gold, *_ in found],
            y=[answer for _, answer, _ in found],
            customdata=[row for *_, row in found],
            name=inert(name),
            mode="markers",
            marker={"size": 7, "color": colors.get(name, BLUE), "opacity": 0.5},
            hovertemplate="row %{customdata}<br>gold %{x}, answer %{y}<extra></extra>",
        )
    exact = {"dash": "dot", "width": 2.2, "color": COLORS[1]}  # on top of the points
    _add(figure, "scatter", x=[low, high], y=[low, high], name="exact", mode="lines", hoverinfo="skip", line=exact)
    return Chart(title, figure)


def chances_chart(rows: Mapping[str, Sequence[tuple[int, float]]]) -> Chart:
    """Probability of the gold label at each validation.

    Args:
        rows: name of a row -> (step, probability).
    """
    figure = _figure(
        260,
        hovermode="x unified",
        xaxis={"title": {"text": "step"}, "rangemode": "tozero"},
        yaxis={"title": {"text": "probability of the gold label"}, "range": [-0.03, 1.03], "tickformat": ".0%"},
    )
    for i, (name, found) in enumerate(rows.items()):
        _add(
            figure,
            "scatter",
            x=[step for step, _ in found],
            y=[chance for _, chance in found],
            name=inert(name),
            mode="lines+markers",
            line={"color": color(i), "width": 2},
            hovertemplate="%{y:.1%}",
        )
    return Chart("Probability of the gold label", figure)
