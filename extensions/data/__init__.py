"""From files to checked examples, and their order. `splits` reads what a run needs."""

from extensions.data.balance import check_classes, class_weights, epoch_sizes
from extensions.data.example import Example, by_question
from extensions.data.examples import (
    check_trainable,
    demonstrations,
    has_split,
    is_labelled,
    is_present,
    load_examples,
    load_training,
    sample_candidate_pair,
    subsample_evenly,
)
from extensions.data.order import BatchOrder, rows_of_epoch
from extensions.data.readers import HUB, SURROGATE

__all__ = [
    "HUB",
    "SURROGATE",
    "BatchOrder",
    "Example",
    "by_question",
    "check_classes",
    "check_trainable",
    "class_weights",
    "demonstrations",
    "epoch_sizes",
    "has_split",
    "is_labelled",
    "is_present",
    "load_examples",
    "load_training",
    "rows_of_epoch",
    "sample_candidate_pair",
    "subsample_evenly",
]
