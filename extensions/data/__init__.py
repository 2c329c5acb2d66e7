"""From files to validated examples, and their order. `RunData.load` reads all examples of a run."""

from extensions.data.balance import class_weights, epoch_sizes
from extensions.data.checks import check_lengths
from extensions.data.example import Example, by_question
from extensions.data.examples import load_examples, load_training
from extensions.data.locate import check_trainable, has_split, is_labelled, is_present
from extensions.data.order import BatchOrder, rows_of_epoch
from extensions.data.sampling import subsample_evenly
from extensions.data.splits import RunData, load_demonstrations, table_split
from extensions.recipe.paths import HUB

__all__ = [
    "HUB",
    "BatchOrder",
    "Example",
    "RunData",
    "by_question",
    "check_lengths",
    "check_trainable",
    "class_weights",
    "epoch_sizes",
    "has_split",
    "is_labelled",
    "is_present",
    "load_demonstrations",
    "load_examples",
    "load_training",
    "rows_of_epoch",
    "subsample_evenly",
    "table_split",
]
