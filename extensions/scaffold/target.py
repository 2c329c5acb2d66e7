"""The target of a task, from its label column: classes, scores or label sets. Pure functions of the rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from extensions.common.errors import UserError
from extensions.scaffold.cells import NUMBER, are_lists_as_text, commas_in_names, number_with_comma, shortened
from extensions.scaffold.columns import MAX_CLASSES, Row, are_ids
from extensions.tasks import cell_label, is_blank, nfc

Kind = Literal["classification", "regression", "multi-label"]
KINDS: tuple[Kind, ...] = ("classification", "regression", "multi-label")

MAX_NUMBER_CLASSES = 10  # more distinct whole numbers are scores
MAX_LABEL_LENGTH = 100  # characters; a longer label is a text
SEPARATORS = (";", "|", ",")  # of the labels in a cell, most reliable first


@dataclass(frozen=True)
class Target:
    """The target that the label column defines."""

    kind: Kind
    why: str
    counts: dict[str, int]  # label as in the data -> rows; empty for a regression
    missing: int  # unlabelled rows; 0 for a multi-label task, where an empty cell means that no label applies
    total: int
    separator: str | None = None  # of the labels in a cell of text; None: cells are lists, or hold one label
    score_range: tuple[float, float] | None = None
    decimals: int = 0


def infer_target(name: Any, rows: Sequence[Row], wanted: Kind | None = None) -> Target:
    """The target that a label column defines, with its labels or its range.

    Args:
        wanted: the user's choice; None: by the cells.

    Raises:
        UserError: the column is not a label column: empty, an id, free text, constant, or not of the `wanted` kind.
    """
    cells = [cell for row in rows if not is_blank(cell := row.get(name))]
    missing = len(rows) - len(cells)
    if not cells:
        raise _rejected(name, f"is empty in all {len(rows)} rows; name the column of the answers")
    if any(isinstance(cell, dict) for cell in cells):
        raise _rejected(name, "holds objects; expected text, numbers or lists of labels")
    lists = [cell for cell in cells if isinstance(cell, (list, tuple))]
    if lists and len(lists) < len(cells):
        raise _rejected(name, "holds lists in some rows and single values in others")
    if lists:
        if wanted not in (None, "multi-label"):
            raise UserError(f"--kind: {wanted}, but column {str(name)!r} holds lists, which are labels of multi-label")
        return _label_sets(
            name, [[cell_label(one) for one in cell] for cell in lists], "cells are lists", None, missing
        )
    texts = [cell_label(cell) for cell in cells]
    numeric = all(map(NUMBER.fullmatch, texts))
    _check_format(name, texts, wanted)
    if wanted == "multi-label":
        separator = _separator(texts) or next((one for one in SEPARATORS if any(one in cell for cell in texts)), None)
        if separator is None:
            raise UserError(
                f"--kind: multi-label, but no cell of column {str(name)!r} holds two labels: expected lists, or text "
                f"with {' or '.join(map(repr, SEPARATORS))} between them"
            )
        return _label_sets(name, _split(texts, separator), "as --kind says", separator, missing)
    if wanted == "regression":
        return _scores(name, texts, "as --kind says", missing)
    distinct = {nfc(one) for one in texts}
    if wanted is None and numeric:
        whole = all(float(one).is_integer() for one in distinct)
        if not whole or len({float(one) for one in distinct}) > MAX_NUMBER_CLASSES:
            if whole and are_ids(name, texts):
                raise _rejected(
                    name,
                    "holds another whole number in each row, as an id does; name the column of the answers, or say "
                    "--kind regression",
                )
            return _scores(name, texts, f"{len(distinct)} distinct numbers", missing)
    separator = _separator(texts) if wanted is None and not numeric else None
    if separator is not None:
        example = shortened(next(one for one in texts if separator in one))
        why = f"cells such as {example!r} hold several labels, with {separator!r} between them"
        return _label_sets(name, _split(texts, separator), why, separator, missing)
    why = f"{len(distinct)} distinct values"
    if wanted:
        why = f"as --kind says; {why}"
    elif numeric:
        why += ", few whole numbers: each gets a probability; --kind regression makes them a score"
    elif commas_in_names(texts):
        why += "; commas are part of the names, since no part occurs alone: --kind multi-label makes the parts labels"
    return Target("classification", why, _counted(name, texts), missing, len(rows))


def _rejected(name: Any, problem: str) -> UserError:
    return UserError(f"--label: column {str(name)!r} {problem}")


def _check_format(name: Any, texts: Sequence[str], wanted: Kind | None) -> None:
    """Raise UserError if another program has written numbers or lists in its own format."""
    comma = number_with_comma(texts)
    if comma is not None and wanted in (None, "regression"):
        lists = "" if wanted else ", or say --kind multi-label if they are lists of labels"
        raise _rejected(
            name,
            f"holds numbers with a comma, such as {comma!r}; write decimals with a point and thousands without a "
            f'separator (pandas: read_csv with decimal="," or thousands=","){lists}',
        )
    if wanted in (None, "multi-label") and are_lists_as_text(texts):
        raise _rejected(
            name,
            f"holds lists written as text, such as {shortened(max(texts, key=len))!r}; write the file as JSONL "
            '(pandas: to_json with orient="records", lines=True), or the labels of a cell with a separator, as '
            "'blue;red'",
        )


def _counted(name: Any, texts: Sequence[str], alone: bool = True) -> dict[str, int]:
    """Label -> rows, the most frequent first, numbers in order. Unicode forms of a label are counted as one.

    Args:
        alone: each text is the whole cell.

    Raises:
        UserError: there are too many labels, or one, or they are texts.
    """
    counts = Counter(texts)
    forms: dict[str, str] = {}
    for label, _ in counts.most_common():
        forms.setdefault(nfc(label), label)
    merged: Counter[str] = Counter()
    for label, count in counts.items():
        merged[forms[nfc(label)]] += count
    numbers = all(map(NUMBER.fullmatch, merged))
    found = dict(sorted(merged.items(), key=lambda item: (float(item[0]) if numbers else -item[1], item[0])))
    shown = ", ".join(repr(shortened(label)) for label in list(found)[:4])
    if len(found) > MAX_CLASSES or (alone and len(found) > 0.8 * len(texts) and len(found) > MAX_NUMBER_CLASSES):
        raise _rejected(
            name,
            f"has {len(found)} distinct values in {len(texts)} rows ({shown}, ...), as an id or a free text has; at "
            f"most {MAX_CLASSES} labels can be listed in a prompt. Name the column of the answers, or join rare labels "
            "into one first",
        )
    if len(found) == 1 and alone:
        raise _rejected(
            name,
            f"is {shown} in every row that has a label; there is nothing to learn. Name another column, or a file with "
            "all classes",
        )
    long = next((label for label in found if len(label) > MAX_LABEL_LENGTH), None)
    if long is not None:
        raise _rejected(
            name,
            f"holds {shortened(long)!r}, {len(long)} characters; a label has at most {MAX_LABEL_LENGTH}. Name the "
            "column of the answers, or give the labels short names in the file",
        )
    odd = next((label for label in found if "\0" in label or any("\ud800" <= c <= "\udfff" for c in label)), None)
    if odd is not None:
        raise _rejected(name, f"holds {odd!r}: NUL and half surrogate pairs are not text")
    return found


def _scores(name: Any, texts: Sequence[str], why: str, missing: int) -> Target:
    wrong = [one for one in texts if not NUMBER.fullmatch(one) or math.isinf(float(one))]
    if wrong:
        raise _rejected(
            name,
            f"holds {shortened(wrong[0])!r} and {len(wrong) - 1} more that are no finite numbers, as the scores of a "
            "regression must be; correct or empty these cells",
        )
    values = [float(one) for one in texts]
    low, high = min(values), max(values)
    if low == high:
        raise _rejected(name, f"is {low:.15g} in every row; there is nothing to learn")
    low, high = round_range(low, high)
    decimals = max(-int(Decimal(one).normalize().as_tuple().exponent) for one in texts)
    useful = 0 if high - low >= 100 else 1 if high - low >= 10 else 2  # decimals that a model can tell apart
    ends = next((n for n in range(7) if round(low, n) == low and round(high, n) == high), None)
    if ends is None:
        raise _rejected(
            name,
            f"has scores within {high - low:g} of each other, too close to be written with 6 decimals; give them in "
            "another unit",
        )
    total = len(texts) + missing
    return Target("regression", why, {}, missing, total, None, (low, high), max(ends, min(decimals, useful)))


def round_range(low: float, high: float) -> tuple[float, float]:
    """The range widened to multiples of a tenth of its power of ten, by less than one step at either end."""
    step = 10.0 ** math.floor(math.log10(high - low))
    if (high - low) / step < 2:
        step /= 2
    digits = max(0, 1 - math.floor(math.log10(step)))
    first, last = math.floor(round(low / step, 9)), math.ceil(round(high / step, 9))
    return round(first * step, digits), round(last * step, digits)


def _split(texts: Sequence[str], separator: str) -> list[list[str]]:
    return [[part.strip() for part in one.split(separator) if part.strip()] for one in texts]


def _separator(texts: Sequence[str]) -> str | None:
    """The separator of the labels in a cell: its parts recur in other combinations, and are fewer than the cells."""
    cells = set(texts)
    for separator in SEPARATORS:
        if separator == "," and commas_in_names(texts):
            continue
        if sum(separator in one for one in texts) < max(2, 0.03 * len(texts)):
            continue
        parts = [set(labels) for labels in _split(list(cells), separator)]
        counts = Counter(label for labels in parts for label in labels)
        combined = {label for labels in parts if len(labels) > 1 for label in labels}
        if not combined or len(counts) > MAX_CLASSES or max(map(len, counts)) > 40:
            continue
        recurring = sum(counts[label] > 1 for label in combined)
        least = 0.7 if separator == "," else 0.5  # class names contain commas, hardly ever another separator
        if recurring >= least * len(combined) and len(counts) <= max(len(cells), 2):
            return separator
    return None


def _label_sets(name: Any, cells: Sequence[Sequence[str]], why: str, separator: str | None, missing: int) -> Target:
    labels = [label for cell in cells for label in dict.fromkeys(cell) if label.strip()]
    if not labels:
        raise _rejected(name, "holds no label in any row")
    counts = _counted(name, labels, alone=False)
    comma = next((label for label in counts if "," in label), None)
    if comma is not None:
        raise _rejected(
            name,
            f"has the label {comma!r}; the answer of a multi-label task lists labels with commas between them, so no "
            "label may hold one. Replace it in the file",
        )
    if len(counts) < 2:
        raise _rejected(name, f"has one label, {next(iter(counts))!r}; a task needs two")
    none = missing + sum(not any(label.strip() for label in cell) for cell in cells)
    if none:
        why += f"; {none} rows have none of them"
    return Target("multi-label", why, counts, 0, len(cells) + missing, separator)
