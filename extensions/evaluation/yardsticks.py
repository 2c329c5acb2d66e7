"""Yardsticks: simple models of the run's training rows, scored on its evaluation rows by the same metrics as the LLM.

majority    the most frequent label or label set of the training rows; in a regression their mean score
tfidf       TF-IDF of words and word pairs, field by field, and logistic regression: one per label in a multi-label
            task, ridge regression in a regression
embeddings  sentence embeddings of the fields and the same regressions, where their encoder's package is installed

They learn from the rows that the run trains on, and from no others.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge

from extensions.data import Example
from extensions.data.partition import stratified_sample
from extensions.distributed import signals, watchdog
from extensions.distributed.strategy import Strategy
from extensions.evaluation.metrics import Prediction, score
from extensions.model.sentence_encoder import embed, encoder_folder
from extensions.tasks import Task

MAX_TRAIN_ROWS = 20_000  # per task; of more rows a stratified sample, to save time
MAX_FEATURES = 100_000  # most frequent words and word pairs per field
WORD = r"\w+|[^\w\s]"  # a word, or a sign such as "!" or an emoji
C = 10.0  # inverse regularisation; 1, the library's default, underfits a few hundred rows of TF-IDF

Features = tuple[Any, Any]  # of the training and the evaluation rows: (n, D) each, sparse or dense


def compute_yardsticks(
    tasks: Sequence[Task], train: Sequence[Example], table: Sequence[Example], seed: int, strategy: Strategy
) -> dict[str, dict[str, Any]]:
    """Yardstick -> task -> result of `score`, with `train_rows`, `run_rows` and `seconds`. Call it on every rank.

    `train_rows` are the rows that it learns from: all `run_rows` of the run, or a sample of `MAX_TRAIN_ROWS`.

    Tasks without training rows in the run, its own or those of `train_task`, are left out.

    Args:
        train: the rows that the run trains on.
        table: the rows to score.

    Raises:
        Stopped: on every rank, if any rank has a stop request.
    """
    found: dict[str, dict[str, Any]] = {}
    work = _pieces(tasks, train, table, seed, strategy.device, found) if strategy.is_rank_0() else iter(())
    # The other ranks wait at a collective per piece, since one that waits too long for all of them counts as hung.
    while strategy.gather(next(work, "done"))[0] != "done":
        watchdog.heartbeat()
        if strategy.stopping():
            raise signals.Stopped
    return strategy.gather(found)[0]


def _pieces(
    tasks: Sequence[Task],
    train: Sequence[Example],
    table: Sequence[Example],
    seed: int,
    device: torch.device,
    found: dict[str, dict[str, Any]],
) -> Generator[None, None, None]:
    """Fills `found`; yields after each piece of work."""
    for task in tasks:
        rows = [example for example in table if example.task.name == task.name]
        names = [task.name, task.train_task]
        whole = next((own for name in names if (own := [e for e in train if e.task.name == name])), [])
        if not rows or not whole or whole[0].task.form != task.form:
            continue
        for kind in ("majority", "tfidf", "embeddings"):
            start = time.monotonic()
            kept = whole if kind == "majority" else stratified_sample(whole, MAX_TRAIN_ROWS, seed)
            if kind == "majority":
                predictions = _majority(task, kept, rows)
            else:
                features = _tfidf(kept, rows) if kind == "tfidf" else (yield from _embeddings(kept, rows, device))
                if features is None:
                    continue
                predictions = _regressed(task, kept, rows, features)
            cost = {"train_rows": len(kept), "run_rows": len(whole), "seconds": time.monotonic() - start}
            found.setdefault(kind, {})[task.name] = score(task, predictions) | cost
            yield


# ---------------------------------------------------------------------------------------------------- features


def _tfidf(train: Sequence[Example], rows: Sequence[Example]) -> Features | None:
    """One block per field; None if all texts are blank."""
    blocks: list[Features] = []
    for field in train[0].task.fields:
        texts, others = ([row.fields[field] for row in part] for part in (train, rows))
        if any(text.strip() for text in texts):
            vectorizer = TfidfVectorizer(
                sublinear_tf=True, ngram_range=(1, 2), token_pattern=WORD, max_features=MAX_FEATURES
            )
            blocks.append((vectorizer.fit_transform(texts), vectorizer.transform(others)))
    if not blocks:
        return None
    return sparse.hstack([a for a, _ in blocks], "csr"), sparse.hstack([b for _, b in blocks], "csr")


def _embeddings(
    train: Sequence[Example], rows: Sequence[Example], device: torch.device
) -> Generator[None, None, Features | None]:
    """The fields' vectors u, v, ..., and |u - v| and u * v of each two (InferSent, Conneau et al. 2017)."""
    folder = encoder_folder()
    if folder is None:
        return None
    both, fields = [*train, *rows], train[0].task.fields
    vectors = yield from embed([row.fields[field] for field in fields for row in both], folder, device)
    blocks = list(vectors.numpy().reshape(len(fields), len(both), -1))
    for u, v in combinations(tuple(blocks), 2):
        blocks += [np.abs(u - v), u * v]
    whole = np.concatenate(blocks, 1)
    return whole[: len(train)], whole[len(train) :]


# -------------------------------------------------------------------------------------------------- predictions


def _majority(task: Task, train: Sequence[Example], rows: Sequence[Example]) -> list[Prediction]:
    golds = [str(row.label) for row in train]
    if task.is_regression:
        return [_prediction(row, float(np.mean([float(gold) for gold in golds])), None) for row in rows]
    counts = Counter(golds)
    order = list(task.labels) if not task.multi_label else list(counts)
    answer = max(order, key=lambda label: counts[label])
    shares = {label: float(_has(task, golds, label).mean()) for label in task.labels}
    return [_prediction(row, answer, shares) for row in rows]


def _regressed(task: Task, train: Sequence[Example], rows: Sequence[Example], features: Features) -> list[Prediction]:
    """Predictions of a regression that is fitted to the training rows."""
    golds, (known, new) = [str(row.label) for row in train], features
    if task.score_range is not None:
        scores = Ridge().fit(known, [float(gold) for gold in golds]).predict(new).clip(*task.score_range)
        return [_prediction(row, answer, None) for row, answer in zip(rows, scores.tolist(), strict=True)]
    columns = dict.fromkeys(task.labels, np.zeros(len(rows)))
    if task.multi_label:
        columns |= {
            label: _logistic(known, _has(task, golds, label), new).get(True, zero) for label, zero in columns.items()
        }
    else:
        columns |= _logistic(known, np.array(golds), new)
    predictions = []
    for row, values in zip(rows, np.stack(list(columns.values()), 1).tolist(), strict=True):
        probabilities = dict(zip(columns, values, strict=True))
        if task.multi_label:
            answer = task.join_labels(label for label, p in probabilities.items() if p > 0.5)
        else:
            answer = max(probabilities, key=lambda label: probabilities[label])
        predictions.append(_prediction(row, answer, probabilities))
    return predictions


def _has(task: Task, golds: Sequence[str], label: str) -> np.ndarray:
    """(n,) whether each row has a label."""
    return np.array([label in task.split_labels(gold) if task.multi_label else label == gold for gold in golds])


def _logistic(known: Any, golds: np.ndarray, new: Any) -> dict[Any, np.ndarray]:
    """Class -> (n,) probabilities of the new rows."""
    classes = np.unique(golds)
    if len(classes) == 1:  # scikit-learn refuses a single class
        return {classes[0].item(): np.ones(new.shape[0])}
    model = LogisticRegression(C=C, max_iter=1000).fit(known, golds)
    return dict(zip(model.classes_.tolist(), model.predict_proba(new).T, strict=True))


def _prediction(row: Example, answer: str | float, probabilities: dict[str, float] | None) -> Prediction:
    task = row.task
    text = f"{answer:.3f}" if isinstance(answer, float) else task.answer(answer)
    positive = None if probabilities is None or task.positive is None else probabilities[task.positive]
    return Prediction(task.name, row.index, text, answer, row.label, row.kept, positive, probabilities)
