"""Label suspects: training rows whose labels the trained model contradicts with high confidence.

They are suspects, not errors: the model may be wrong. A row that was trained for many epochs may be memorised with a
wrong label, and is then not among them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from extensions.common.files import write_text
from extensions.data import Example
from extensions.evaluation.metrics import Prediction
from extensions.tasks import number_text

CONFIDENT = 0.9  # least probability of another label; in a multi-label task, of one label's presence or absence
FAR = 0.25  # least distance of a predicted score from the label, as a share of the score range
FILE = "label_suspects.csv"
COLUMNS = ("task", "index", "label", "answer", "probability")


@dataclass(frozen=True)
class Suspect:
    """A training row and the model's answer by likelihood."""

    row: Example
    answer: str  # in the form of the label
    probability: float  # that the label is wrong, by the model; of a score: that it is farther than `FAR` away


def find_suspects(rows: Sequence[Example], predictions: Sequence[Prediction]) -> list[Suspect]:
    """The suspects among training rows, most confident first.

    Args:
        predictions: one per row, by decoding "likelihood".
    """
    found = []
    for row, prediction in zip(rows, predictions, strict=True):
        assert prediction.probabilities is not None
        suspect = _suspect(row, prediction.answer, prediction.probabilities)
        found += [suspect] if suspect is not None else []
    return sorted(found, key=lambda suspect: -suspect.probability)


def _suspect(row: Example, answer: str | float | None, probabilities: dict[str, float]) -> Suspect | None:
    task, label = row.task, str(row.label)
    if task.score_range is not None:
        gold, reach = float(label), FAR * (task.score_range[1] - task.score_range[0]) * (1 + 1e-9)
        far = sum(p for score, p in probabilities.items() if abs(float(score) - gold) > reach)
        predicted = float(str(answer))
        return Suspect(row, number_text(predicted, 3), far) if abs(predicted - gold) > reach else None
    if task.multi_label:
        present = task.split_labels(label)
        confidence = max(1 - p if one in present else p for one, p in probabilities.items())
    else:
        confidence = probabilities[str(answer)] if answer != label else 0.0
    return Suspect(row, str(answer), confidence) if confidence >= CONFIDENT else None


def write_suspects(suspects: Sequence[Suspect], rows: Sequence[Example], folder: Path) -> None:
    """Write `FILE`: `COLUMNS`, then the input fields of the checked rows, unchanged.

    A text that begins with "=" stays so, and a spreadsheet may read it as a formula.
    """
    fields = list(dict.fromkeys(name for row in rows for name in row.task.fields))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*COLUMNS, *(f"input {name}" if name in COLUMNS else name for name in fields)])
    for suspect in suspects:
        row = suspect.row
        known = (row.task.name, row.index, row.label, suspect.answer, f"{suspect.probability:.4f}")
        writer.writerow([*known, *(row.fields.get(name, "") for name in fields)])
    write_text(folder / FILE, text.getvalue())
