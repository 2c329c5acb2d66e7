"""From files to checked examples, and their order. `splits` reads what a run needs."""

from extensions.data.example import Example, units
from extensions.data.examples import (
    check_trainable,
    demonstrations,
    has_split,
    is_labelled,
    is_present,
    load_examples,
    load_training,
    one_right_one_wrong,
    spread,
)
from extensions.data.order import BatchOrder, rows_of_epoch
from extensions.data.readers import HUB, SURROGATE

__all__ = [
    "HUB",
    "SURROGATE",
    "BatchOrder",
    "Example",
    "check_trainable",
    "demonstrations",
    "has_split",
    "is_labelled",
    "is_present",
    "load_examples",
    "load_training",
    "one_right_one_wrong",
    "rows_of_epoch",
    "spread",
    "units",
]
