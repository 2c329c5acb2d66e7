"""Normal forms in which label words and answers are compared."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

_MAX_MARKS = 30  # in a row in any real writing (Stream-Safe Text Format, UAX 15)
_SPLITS_INTO_MARKS = "\u0f73\u0f75\u0f81"  # not marks by class, but two marks each when decomposed
_BECOMES_ASCII = re.compile("([\u037e\u1fef\u212a])")  # Greek question mark and varia, Kelvin sign


def nfc(text: str) -> str:
    """Unicode NFC, with two exceptions.

    Text with more marks in a row than any real writing is unchanged, since sorting them is quadratic. Characters that
    NFC would turn into ASCII are unchanged too: only ASCII is read as ASCII.
    """
    if text.isascii():
        return text
    marks = 0
    for character in text:
        marks = marks + 1 if unicodedata.combining(character) or character in _SPLITS_INTO_MARKS else 0
        if marks > _MAX_MARKS:
            return text
    return "".join(
        part if _BECOMES_ASCII.match(part) else unicodedata.normalize("NFC", part)
        for part in _BECOMES_ASCII.split(text)
    )


def fold(word: str) -> str:
    """A word in lower case, with single spaces and in NFC."""
    return " ".join(nfc(nfc(word).lower()).split())


_SPACES = "".join(filter(str.isspace, map(chr, range(0x3001))))
_QUOTES = "\"'`\u00b4\u00ab\u00bb\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f\u2039\u203a"
_QUOTES += "\u300c\u300d\u300e\u300f\u301d\u301e\u301f\uff02\uff07"  # CJK
_BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # around right-to-left text
_AROUND = _SPACES + _QUOTES + _BIDI
_STOPS = ".\u3002\uff0e\uff61\u06d4\u0964"  # Latin, CJK (three widths), Arabic, Devanagari
_KELVIN = "\u212a"  # lower() makes it an ASCII k


def normalize_answer(answer: str) -> str:
    """A word or phrase folded, without surrounding spaces, quotes and direction marks, and without a full stop."""
    text = nfc(answer).strip(_AROUND)
    if text.endswith(tuple(_STOPS)):
        text = text[:-1].rstrip(_AROUND)
    return _KELVIN.join(map(fold, (text or answer).split(_KELVIN)))


def cell_label(value: Any) -> str:
    """The text of a label. A whole float becomes an integer: pandas makes integers float if a column has gaps."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return str(value).strip()


def is_blank(value: Any) -> bool:
    """Whether a cell is empty: None, NaN, pandas' NA or NaT, or text without a visible character."""
    if isinstance(value, str):
        return not value.strip()
    nan = isinstance(value, float) and value != value
    return value is None or nan or type(value).__name__ in ("NAType", "NaTType")


def number_text(value: float, decimals: int) -> str:
    """A number as a model should write it: fixed decimals, no "-0"."""
    return f"{round(value, decimals) + 0.0:.{decimals}f}"
