"""What the columns of a table hold, and what kind of answer a label column asks for: pure functions of the rows."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from extensions.common.errors import UserError
from extensions.scaffold.cells import (
    NUMBER,
    are_lists_as_text,
    commas_in_names,
    is_number,
    most,
    number_with_comma,
    shortened,
)
from extensions.tasks import cell_label, fold, is_blank, nfc

Row = Mapping[Any, Any]
Kind = Literal["classification", "regression", "multi-label"]
KINDS: tuple[Kind, ...] = ("classification", "regression", "multi-label")

MOST_CLASSES = 50  # more are no label set that a prompt can list
FEW_NUMBERS = 10  # distinct whole numbers that are taken for classes
LONGEST_LABEL = 100  # characters; more is a text
SEPARATORS = (";", "|", ",")  # of a multi-label cell of text, in the order of trust
SHOWN = 4  # values of a column that a message quotes
_DATE = re.compile(
    r"[0-9]{4}[-/.][0-9]{1,2}[-/.][0-9]{1,2}([T ][0-9:.]+(Z|[+-][0-9:]+)?)?|[0-9]{1,2}[-/.][0-9]{1,2}[-/.][0-9]{2,4}"
    r"( [0-9:]+)?|[0-9]{1,2}:[0-9]{2}(:[0-9]{2})?"
)
_ADDRESS = re.compile(r"(https?://|www\.|mailto:)\S+|[^\s@]+@[^\s@]+\.[^\s@]+", re.IGNORECASE)
_ID_NAME = re.compile(r"(^|[\W_])(id|idx|index|uuid|guid|key|nr|no|number|row)$|^unnamed: ?\d+$|[a-z]I[Dd]$", re.I)


@dataclass(frozen=True)
class Column:
    """One column, by its filled cells."""

    name: Any  # its name, or its index where there is no header
    kind: Literal["text", "category", "number", "id", "date", "address", "constant", "empty", "list", "object"]
    why: str  # in words, with the numbers that it is decided by
    filled: int  # cells that hold something

    @property
    def is_text(self) -> bool:
        """Whether a prompt shows it when nobody says which columns it should show."""
        return self.kind in ("text", "category")


@dataclass(frozen=True)
class Answers:
    """What the label column asks for."""

    kind: Kind
    why: str
    counts: dict[str, int]  # label as it stands in the data -> rows; empty for a regression
    missing: int  # rows without a label; of a multi-label task none is, for their answer is that no label applies
    total: int
    separator: str | None = None  # of the labels in a cell of text; None: cells are lists, or hold one label
    score_range: tuple[float, float] | None = None
    decimals: int = 0


def describe(name: Any, rows: Sequence[Row]) -> Column:
    """What a column holds."""
    cells = [cell for row in rows if not is_blank(cell := row.get(name))]
    if not cells:
        return Column(name, "empty", "no cell is filled", 0)
    if any(isinstance(cell, (list, tuple)) for cell in cells):
        return Column(name, "list", "cells are lists", len(cells))
    if any(isinstance(cell, (dict, bytes)) for cell in cells):
        return Column(name, "object", "cells are objects", len(cells))
    texts = [cell_label(cell) for cell in cells]
    distinct, count = len(set(texts)), len(texts)
    unique = distinct >= 0.9 * count and count > 1  # some rows may stand there twice
    words = sum(len(one.split()) for one in texts) / count
    if distinct == 1 and count > 1:
        return Column(name, "constant", f"always {shortened(texts[0])!r}", count)
    if most(map(is_number, texts)) or all(isinstance(cell, (int, float)) for cell in cells):
        if unique and (_ID_NAME.search(str(name)) or _counts_up(texts)):
            return Column(name, "id", "numbers, another in each row", count)
        return Column(name, "number", f"{distinct} distinct numbers", count)
    if most(map(_DATE.fullmatch, texts)):
        return Column(name, "date", f"dates or times, such as {texts[0]!r}", count)
    if most(map(_ADDRESS.fullmatch, texts)):
        return Column(name, "address", f"web or mail addresses, such as {shortened(texts[0])!r}", count)
    digits = sum(any(map(str.isdigit, one)) for one in texts) / count
    if unique and words < 1.5 and count > 2 and (_ID_NAME.search(str(name)) or digits > 0.9):
        return Column(name, "id", f"one word, another in each row, such as {shortened(texts[0])!r}", count)
    if words < 4 and distinct <= min(MOST_CLASSES, count / 4):
        return Column(name, "category", f"{distinct} distinct values", count)
    if not isinstance(cells[0], str):
        return Column(name, "object", f"cells are {type(cells[0]).__name__}", count)
    return Column(name, "text", f"{words:.0f} word{'s' if round(words) != 1 else ''} on average", count)


def _counts_up(texts: Sequence[str]) -> bool:
    """Whether numbers are those from one to another without a gap."""
    try:
        numbers = [int(one) for one in texts]
    except ValueError:
        return False
    return max(numbers) - min(numbers) == len(numbers) - 1


def nearest(name: str, columns: Sequence[Any], option: str) -> Any:
    """The column of a name.

    Raises:
        UserError: there is none; with the nearest.
    """
    exact = next((column for column in columns if str(column) == name), None)
    if exact is None:  # a shell drops the spaces around a name easily, and two Unicode forms look alike
        alike = [column for column in columns if fold(str(column)) == fold(name)]
        exact = alike[0] if len(alike) == 1 else None
    if exact is not None:
        return exact
    near = difflib.get_close_matches(name.lower(), [str(column).lower() for column in columns], n=1, cutoff=0.5)
    guess = [repr(str(column)) for column in columns if str(column).lower() in near]
    hint = f"; did you mean {guess[0]}?" if guess else "."
    raise UserError(f"{option}: no column {name!r}{hint} The columns are: {', '.join(map(repr, map(str, columns)))}")


def suggested_label(described: Sequence[Column], rows: Sequence[Row]) -> Any | None:
    """The column that most looks like a label: by its name, else the last with few values; None where none does."""
    named = re.compile(r"^(label|labels|class|target|category|y|gold|answer|sentiment|rating|score)$", re.IGNORECASE)
    able = [c for c in described if c.kind not in ("empty", "constant", "id", "date", "address", "object")]
    for column in able:
        if named.match(str(column.name)):
            return column.name
    few = [c.name for c in able if c.kind in ("category", "list", "number")]
    if few:
        return few[-1]
    small = [c.name for c in able if 1 < len({cell_label(row.get(c.name)) for row in rows}) <= max(2, len(rows) // 2)]
    return small[-1] if small else None


# ---------------------------------------------------------------------------------------------------------- answers


def answers(name: Any, rows: Sequence[Row], wanted: Kind | None = None) -> Answers:
    """The kind of task that a label column makes, with its labels or its range.

    Args:
        wanted: what the user says; None: by the cells.

    Raises:
        UserError: the column holds no labels: it is empty, an id or free text, has one value, or is not of `wanted`.
    """
    cells = [cell for row in rows if not is_blank(cell := row.get(name))]
    if not cells:
        raise UserError(
            f"--label: column {str(name)!r} is empty in all {len(rows)} rows; name the column of the answers"
        )
    missing = len(rows) - len(cells)
    if any(isinstance(cell, dict) for cell in cells):
        raise UserError(f"--label: column {str(name)!r} holds objects; expected text, numbers or lists of labels")
    lists = [cell for cell in cells if isinstance(cell, (list, tuple))]
    if lists and len(lists) < len(cells):
        raise UserError(f"--label: column {str(name)!r} holds lists in some rows and single values in others")
    if lists:
        if wanted not in (None, "multi-label"):
            raise UserError(f"--kind: {wanted}, but column {str(name)!r} holds lists, which are labels of multi-label")
        return _of_parts(name, [[cell_label(one) for one in cell] for cell in lists], "cells are lists", None, missing)
    texts = [cell_label(cell) for cell in cells]
    numeric = all(map(NUMBER.fullmatch, texts))
    _check_form(name, texts, wanted)
    if wanted == "multi-label":
        separator = _separator(texts) or next((one for one in SEPARATORS if any(one in cell for cell in texts)), None)
        if separator is None:
            raise UserError(
                f"--kind: multi-label, but no cell of column {str(name)!r} holds two labels: expected lists, or text "
                f"with {' or '.join(map(repr, SEPARATORS))} between them"
            )
        return _of_parts(name, _parts(texts, separator), "as --kind says", separator, missing)
    if wanted == "regression":
        return _scores(name, texts, "as --kind says", missing)
    distinct = {nfc(one) for one in texts}
    if wanted is None and numeric:
        whole = all(float(one).is_integer() for one in distinct)
        if len({float(one) for one in distinct}) > FEW_NUMBERS or not whole:
            if whole and len(distinct) == len(texts) and (_ID_NAME.search(str(name)) or _counts_up(texts)):
                raise UserError(
                    f"--label: column {str(name)!r} holds another whole number in each row, as an id does; name the "
                    "column of the answers, or say --kind regression"
                )
            return _scores(name, texts, f"{len(distinct)} distinct numbers", missing)
    separator = _separator(texts) if wanted is None and not numeric else None
    if separator is not None:
        why = f"cells such as {shortened(next(one for one in texts if separator in one))!r} hold several labels"
        return _of_parts(name, _parts(texts, separator), f"{why}, with {separator!r} between them", separator, missing)
    why = f"{len(distinct)} distinct values"
    if wanted:
        why = f"as --kind says; {why}"
    elif numeric:
        why += ", few whole numbers: each gets a probability of its own; --kind regression makes them a score"
    elif commas_in_names(texts):
        why += "; commas are part of the names, since no part stands alone: --kind multi-label makes the parts labels"
    return Answers("classification", why, _counted(name, texts), missing, len(rows))


def _check_form(name: Any, texts: Sequence[str], wanted: Kind | None) -> None:
    """Raise UserError where cells are text that another program wrote for a number or for a list."""
    comma = number_with_comma(texts)
    if comma is not None and wanted in (None, "regression"):
        lists = "" if wanted else ", or say --kind multi-label if they are lists of labels"
        raise UserError(
            f"--label: column {str(name)!r} holds numbers with a comma, such as {comma!r}; write decimals with a point "
            f'and thousands without a separator (pandas: read_csv with decimal="," or thousands=","){lists}'
        )
    if wanted in (None, "multi-label") and are_lists_as_text(texts):
        longest = shortened(max(texts, key=len))
        raise UserError(
            f"--label: column {str(name)!r} holds lists written as text, such as {longest!r}; write the file as JSONL "
            '(pandas: to_json with orient="records", lines=True), or the labels of a cell with a separator, as '
            "'blue;red'"
        )


def _counted(name: Any, texts: Sequence[str], alone: bool = True) -> dict[str, int]:
    """Label -> rows, the commonest first, numbers in their order; labels that differ in Unicode form alone are one.

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
    shown = ", ".join(repr(shortened(label)) for label in list(found)[:SHOWN])
    if len(found) > MOST_CLASSES or (alone and len(found) > 0.8 * len(texts) and len(found) > FEW_NUMBERS):
        raise UserError(
            f"--label: column {str(name)!r} has {len(found)} distinct values in {len(texts)} rows ({shown}, ...), as "
            f"an id or a free text has; at most {MOST_CLASSES} labels can be listed in a prompt. Name the column of "
            "the answers, or join rare labels into one first"
        )
    if len(found) == 1 and alone:
        raise UserError(
            f"--label: column {str(name)!r} is {shown} in every row that has a label; there is nothing to learn. Name "
            "another column, or a file with all classes"
        )
    long = next((label for label in found if len(label) > LONGEST_LABEL), None)
    if long is not None:
        raise UserError(
            f"--label: column {str(name)!r} holds {shortened(long)!r}, {len(long)} characters; a label has at most "
            f"{LONGEST_LABEL}. Name the column of the answers, or give the labels short names in the file"
        )
    odd = next((label for label in found if "\0" in label or any("\ud800" <= c <= "\udfff" for c in label)), None)
    if odd is not None:
        raise UserError(f"--label: column {str(name)!r} holds {odd!r}: NUL and half surrogate pairs are not text")
    return found


def _scores(name: Any, texts: Sequence[str], why: str, missing: int) -> Answers:
    wrong = [one for one in texts if not NUMBER.fullmatch(one) or math.isinf(float(one))]
    if wrong:
        raise UserError(
            f"--label: column {str(name)!r} holds {shortened(wrong[0])!r} and {len(wrong) - 1} more that are no finite "
            "numbers, which the scores of a regression are; correct or empty these cells"
        )
    values = [float(one) for one in texts]
    low, high = min(values), max(values)
    if low == high:
        raise UserError(f"--label: column {str(name)!r} is {low:.15g} in every row; there is nothing to learn")
    low, high = round_range(low, high)
    decimals = max(-int(Decimal(one).normalize().as_tuple().exponent) for one in texts)
    steps = 0 if high - low >= 100 else 1 if high - low >= 10 else 2  # as fine as a model can tell apart
    ends = next((n for n in range(7) if round(low, n) == low and round(high, n) == high), None)
    if ends is None:
        raise UserError(
            f"--label: the scores of column {str(name)!r} are within {high - low:g} of each other, too close to be "
            "written with 6 decimals; give them in another unit"
        )
    found = max(ends, min(decimals, steps))
    return Answers("regression", why, {}, missing, len(texts) + missing, None, (low, high), found)


def round_range(low: float, high: float) -> tuple[float, float]:
    """The range widened to round numbers: multiples of a tenth of its power of ten, at most by a step at either end."""
    step = 10.0 ** math.floor(math.log10(high - low))
    if (high - low) / step < 2:
        step /= 2
    digits = max(0, 1 - math.floor(math.log10(step)))
    return round(math.floor(round(low / step, 9)) * step, digits), round(
        math.ceil(round(high / step, 9)) * step, digits
    )


def _parts(texts: Sequence[str], separator: str) -> list[list[str]]:
    return [[part.strip() for part in one.split(separator) if part.strip()] for one in texts]


def _separator(texts: Sequence[str]) -> str | None:
    """What stands between the labels of a cell: parts recur, in other company, and are fewer than the cells."""
    cells = set(texts)
    for separator in SEPARATORS:
        if separator == "," and commas_in_names(texts):
            continue
        several = [one for one in texts if separator in one]
        if len(several) < max(2, 0.03 * len(texts)):
            continue
        parts = {one: list(dict.fromkeys(_parts([one], separator)[0])) for one in cells}
        company = Counter(part for found in parts.values() for part in found)
        joined = {part for one, found in parts.items() if len(found) > 1 for part in found}
        if not joined or len(company) > MOST_CLASSES or max(map(len, company)) > 40:
            continue
        recur = sum(company[part] > 1 for part in joined)
        likely = 0.7 if separator == "," else 0.5  # names of classes hold commas, hardly ever another separator
        if recur >= likely * len(joined) and len(company) <= max(len(cells), 2):
            return separator
    return None


def _of_parts(name: Any, cells: Sequence[Sequence[str]], why: str, separator: str | None, missing: int) -> Answers:
    parts = [part for cell in cells for part in dict.fromkeys(cell) if part.strip()]
    if not parts:
        raise UserError(f"--label: column {str(name)!r} holds no label in any row")
    counts = _counted(name, parts, alone=False)
    comma = next((label for label in counts if "," in label), None)
    if comma is not None:
        raise UserError(
            f"--label: column {str(name)!r} has the label {comma!r}; the answer of a multi-label task lists labels "
            "with commas between them, so no label may hold one. Replace it in the file"
        )
    if len(counts) < 2:
        raise UserError(f"--label: column {str(name)!r} knows one label, {next(iter(counts))!r}; a task needs two")
    none = missing + sum(not any(part.strip() for part in cell) for cell in cells)
    if none:
        why += f"; {none} rows have none of them"
    return Answers("multi-label", why, counts, 0, len(cells) + missing, separator)
