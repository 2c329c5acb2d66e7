"""An encoder with a task head: input tensors, weights, and predictions from outputs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError  # nosec B403 # only its exception class
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForSequenceClassification
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.tokenization_utils_base import BatchEncoding, PreTrainedTokenizerBase

from extensions.common.errors import UserError
from extensions.data import Example
from extensions.data.checks import NAMED
from extensions.evaluation.likelihood import log_odds
from extensions.evaluation.metrics import Prediction
from extensions.model.loading import load_config, load_tokenizer, model_folder
from extensions.recipe import Model
from extensions.tasks import Task


def segments(example: Example, sep: str) -> tuple[str, str | None]:
    """First segment: the task's long text, the only one to truncate. Second: its other fields in order, if any."""
    task = example.task
    others = [example.fields[name] for name in task.fields if name != task.long_field]
    return example.fields[task.long_field], f" {sep} ".join(others) if others else None


class SegmentCollator:
    """Data collator of the Trainer: from examples with the same fields to a padded batch.

    Args:
        max_tokens: longest input; only the first segment is truncated.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    def check(self, examples: Sequence[Example]) -> None:
        """Raises UserError for a row whose second segment leaves no room for the first."""
        for example in examples:
            second = segments(example, self.tokenizer.sep_token)[1]
            if second is None or len(second.encode()) + 8 < self.max_tokens:  # a token is at least one byte
                continue
            needed = len(self.tokenizer("", second, verbose=False)["input_ids"]) + 1
            if needed > self.max_tokens:
                task = example.task
                others = ", ".join(name for name in task.fields if name != task.long_field)
                raise UserError(
                    f"encoder.max_tokens: {self.max_tokens} is too short for row {example.index} of {task.name}: only "
                    f"{task.long_field} is truncated, and {others} alone need {needed} tokens; raise it, or remove "
                    "that row"
                )

    def check_lengths(self, examples: Sequence[Example], what: str, warn: Callable[[str], None]) -> None:
        """Warn of the rows of each task whose first segment is cut: their number, and the first ones."""
        cut: dict[str, list[str]] = {}
        for example in examples:
            pair = segments(example, self.tokenizer.sep_token)
            if sum(len(text.encode()) for text in pair if text) + 8 <= self.max_tokens:  # a token is at least one byte
                continue
            tokens = len(self.tokenizer(*pair, verbose=False)["input_ids"])
            if tokens > self.max_tokens:
                cut.setdefault(example.task.display_name, []).append(f"{example.index} ({tokens} tokens)")
        for name, rows in cut.items():
            warn(
                f"{name}: {len(rows)} {what} are cut to {self.max_tokens} tokens (encoder.max_tokens, the model's "
                f"limit): the end of the text is lost, of row {', '.join(rows[:NAMED])}{', ...' * (len(rows) > NAMED)}"
            )

    def __call__(self, examples: Sequence[Example]) -> BatchEncoding:
        """`input_ids`, `attention_mask`, ... (B, T), padded to the longest row.

        Labelled examples, which are of one task, also give `labels` (B,): class indices or scores.
        """
        firsts, seconds = zip(*(segments(example, self.tokenizer.sep_token) for example in examples), strict=True)
        batch = self.tokenizer(
            list(firsts),
            None if seconds[0] is None else list(seconds),
            truncation="only_first",
            max_length=self.max_tokens,
            padding=True,
            return_tensors="pt",
        )
        task, golds = examples[0].task, [example.label for example in examples]
        if golds[0] is not None:
            classes = list(task.labels)
            batch["labels"] = torch.tensor(
                [float(str(gold)) if task.is_regression else classes.index(str(gold)) for gold in golds]
            )
        return batch


def load_collator(model: Model, max_tokens: int | None) -> SegmentCollator:
    """The collator with an encoder's tokenizer.

    Args:
        max_tokens: recipe key encoder.max_tokens; None: the model's limit.

    Raises:
        UserError: the model cannot be loaded, is not an encoder, or has a lower limit than `max_tokens`.
    """
    for key, value in (("adapter", model.adapter), ("load_in_4bit", model.load_in_4bit)):
        if value:
            raise UserError(f"model.{key}: {value} does not go with encoders, whose weights are all trained; remove it")
    config = load_config(model)
    if config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or config.is_encoder_decoder:
        raise UserError(
            f"model.path: {model.path!r} is a {config.model_type} model and no encoder; launch/encoder.sh takes BERT "
            "and similar models, for example google-bert/bert-base-uncased. For a decoder-only LLM use launch/ppo.sh "
            "or launch/sft.sh"
        )
    tokenizer = load_tokenizer(model)
    for name in ("sep_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise UserError(
                f"model.path: the tokenizer of {model.path!r} has no {name}, which encoder inputs need; add it to its "
                "tokenizer_config.json, or choose another encoder"
            )
    limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", sys.maxsize))
    if max_tokens is not None and max_tokens > limit:
        raise UserError(f"encoder.max_tokens: {max_tokens} is more than the {limit} that {model.path!r} takes")
    return SegmentCollator(tokenizer, max_tokens or limit)


def load_encoder(
    model: Model, task: Task, seed: int, start: Path | None = None, warn: Callable[[str], None] = print
) -> PreTrainedModel:
    """An encoder in float32 with a fresh head for `task`: its labels as classes, in order, or one score.

    Args:
        seed: seed of the head's initialization.
        start: folder of a fine-tuned model whose encoder is used; None: that of `model.path`.

    Raises:
        UserError: the weights cannot be loaded.
    """
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code, "dtype": torch.float32}
    if model.attn_implementation != "auto":
        options["attn_implementation"] = model.attn_implementation
    path, level = str(start or model_folder(model)), transformers.logging.get_verbosity()
    try:
        transformers.logging.set_verbosity_error()  # hides the report that the head is not in the file
        source, info = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, UnpicklingError) as error:
        key = "the intermediate model" if start else "model.path"
        raise UserError(f"{key}: cannot load {path!r}: {' '.join(str(error).split())[:400]}") from error
    finally:
        transformers.logging.set_verbosity(level)
    missing = sorted(key for key in info["missing_keys"] if key.startswith(f"{source.base_model_prefix}."))
    if missing:
        warn(f"{path} lacks {len(missing)} encoder tensors, which are initialized at random: {', '.join(missing[:3])}")
    # A head in the file is not used, even if its size fits (MNLI and CB both have three labels): the encoder is copied
    # into a new model.
    config = load_config(model)
    if task.is_regression:
        config.update({"num_labels": 1, "problem_type": "regression"})
    else:
        names = dict(enumerate(task.labels))
        indices = {label: index for index, label in names.items()}
        config.update({"id2label": names, "label2id": indices, "problem_type": "single_label_classification"})
    transformers.set_seed(seed)
    fresh = AutoModelForSequenceClassification.from_config(config, **options)
    fresh.base_model.load_state_dict(source.base_model.state_dict())
    return fresh


def predictions_of(labels: Sequence[str], examples: Sequence[Example], logits: Tensor) -> list[Prediction]:
    """Predictions from a model's outputs.

    Args:
        labels: labels of the task that the model was trained on, in class order; empty for a regression.
        logits: (B, labels), or scores (B, 1).

    Raises:
        UserError: the outputs are NaN or infinite.
    """
    if not torch.isfinite(logits).all():
        raise UserError(
            f"the model of {examples[0].task.name} produces non-finite output: its training diverged; use a lower "
            "encoder.lr"
        )
    found = []
    for example, row in zip(examples, logits.float(), strict=True):
        task, positive, odds, probabilities = example.task, None, None, None
        answer: str | float
        if task.score_range is not None:
            low, high = task.score_range
            answer = min(max(float(row[0]), low), high)
            text = f"{answer:.3f}"
        else:
            answer = labels[int(row.argmax())]
            text = task.answer(answer)
            probabilities = dict(zip(labels, row.double().softmax(-1).tolist(), strict=True))
            if task.is_ranked:
                positive = probabilities[str(task.positive)]
                odds = float(log_odds(row[None], labels.index(str(task.positive))))
        kept, gold, likely = example.kept, example.label, None if probabilities is None else answer
        found.append(
            Prediction(task.name, example.index, text, answer, gold, kept, positive, probabilities, likely, odds)
        )
    return found
