"""Bootstrap intervals: the metrics of all resamples at once, from weighted counts, sums and ranks.

A resample draws G of the G questions with replacement, which gives each question a weight. Questions with the same rows
(golds and answers) are interchangeable, so the weights of the U distinct ones are drawn: a multinomial with the same
distribution. A classification of 40 000 rows thus needs a few weights per resample. In the functions below, R is the
number of resamples in a chunk, and K the number of distinct rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

RESAMPLES = 1000
CHUNK = 2**22  # weights per chunk, 32 MiB: bounds the memory for many distinct rows


@dataclass(frozen=True)
class Resampler:
    """The distinct rows and questions of a task.

    Attributes:
        golds, answers: (K, ...) of the distinct rows.
        counts: (U,) number of questions of each distinct kind.
        rows: (U, K) number of each distinct row in a question.
        values: metric of a question -> (U,) its values.
    """

    golds: np.ndarray
    answers: np.ndarray
    counts: np.ndarray
    rows: sparse.csr_array
    values: dict[str, np.ndarray]

    @classmethod
    def of(
        cls,
        golds: np.ndarray,
        answers: np.ndarray,
        questions: Sequence[Sequence[int]],
        values: Mapping[str, np.ndarray],
    ) -> Resampler:
        """
        Args:
            golds, answers: (n, ...) of all rows.
            questions: the row indices of each question.
            values: metric of a question -> (questions,) its values.
        """
        pairs = np.stack([golds, answers], axis=1)
        pairs, kinds = np.unique(pairs, axis=0, return_inverse=True)
        columns = [values[name].tolist() for name in values]
        distinct = Counter(
            (tuple(sorted(kinds[rows].tolist())), *of_question)
            for rows, *of_question in zip(questions, *columns, strict=True)
        )
        members = [key[0] for key in distinct]
        starts = np.cumsum([0, *map(len, members)])
        flat = np.fromiter((kind for rows in members for kind in rows), int, starts[-1])
        rows = sparse.csr_array((np.ones(len(flat)), flat, starts), shape=(len(members), len(pairs)))
        of_questions = {name: np.array([key[1 + k] for key in distinct]) for k, name in enumerate(values)}
        return cls(pairs[:, 0], pairs[:, 1], np.array(list(distinct.values())), rows, of_questions)

    def draws(self) -> Iterator[np.ndarray]:
        """(R, U) weights of the distinct questions, in chunks; the same at any chunk size."""
        rng, total = np.random.default_rng(0), int(self.counts.sum())
        size = max(1, CHUNK // max(self.rows.shape))
        for first in range(0, RESAMPLES, size):
            yield rng.multinomial(total, self.counts / total, min(size, RESAMPLES - first)).astype(float)

    def intervals(self, metrics: Sequence[str], labels: int, positive: int | None) -> dict[str, list[float]]:
        """95% percentile intervals of the metrics.

        Args:
            labels: number of the task's labels; 0 in a regression.
            positive: index of the label that `f1` and `f1a` are computed for.
        """
        chunks: list[dict[str, np.ndarray]] = []
        for drawn in self.draws():
            weights = (self.rows.T @ drawn.T).T
            of_questions = {name: drawn @ values / drawn.sum(1) for name, values in self.values.items()}
            chunks.append(weighted_metrics(weights, self.golds, self.answers, labels, positive) | of_questions)
        found = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in metrics}
        return {name: np.percentile(values, [2.5, 97.5]).tolist() for name, values in found.items()}


def weighted_metrics(
    weights: np.ndarray, golds: np.ndarray, answers: np.ndarray, labels: int, positive: int | None = None
) -> dict[str, np.ndarray]:
    """The metrics of rows, each with a weight.

    Args:
        weights: (R, K), whole numbers.
        golds, answers: of the K rows, as in `metrics.arrays_of`.

    Returns:
        Metric -> (R,). Undefined values are 0, as in `metrics.score`.
    """
    if not labels:
        return _of_scores(weights, golds, answers)
    if golds.ndim == 2:
        return _of_label_sets(weights, golds, answers)
    return _of_labels(weights, golds, answers, labels, positive)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotients; 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=denominator != 0)


def _of_labels(
    weights: np.ndarray, golds: np.ndarray, answers: np.ndarray, labels: int, positive: int | None
) -> dict[str, np.ndarray]:
    one_hot = np.eye(labels + 1)  # the last column: a wrong format, -1
    total, right = weights.sum(1), weights @ (one_hot[golds] * (golds == answers)[:, None])[:, :labels]
    gold, answered = weights @ one_hot[golds], weights @ one_hot[answers]
    # Matthews' correlation for several classes (Gorodkin's R_K); a wrong format is a class.
    covariance = total * right.sum(1) - (gold * answered).sum(1)
    spread = (total**2 - (gold**2).sum(1)) * (total**2 - (answered**2).sum(1))
    gold, answered = gold[:, :labels], answered[:, :labels]
    f1 = _ratio(2 * right, gold + answered)
    found = {
        "accuracy": right.sum(1) / total,
        "balanced_accuracy": _ratio(right, gold).sum(1) / (gold > 0).sum(1),
        "matthews": _ratio(covariance, np.sqrt(spread)),
        "f1_macro": f1.sum(1) / (gold + answered > 0).sum(1),  # over the labels that occur
    }
    return found if positive is None else found | {"f1": f1[:, positive], "f1a": f1[:, positive]}


def _of_label_sets(weights: np.ndarray, golds: np.ndarray, answers: np.ndarray) -> dict[str, np.ndarray]:
    given = answers.clip(0)
    right, both = weights @ (golds * given), weights @ (golds + given)
    return {
        "f1_micro": _ratio(2 * right.sum(1), both.sum(1)),
        "f1_macro": _ratio(2 * right, both).mean(1),
        "subset_accuracy": weights @ (golds == answers).all(1) / weights.sum(1),
    }


def _of_scores(weights: np.ndarray, golds: np.ndarray, answers: np.ndarray) -> dict[str, np.ndarray]:
    errors, total = answers - golds, weights.sum(1)
    squares = weights @ errors**2
    (gold_ranks, gold_varies), (answer_ranks, answer_varies) = _ranks(weights, golds), _ranks(weights, answers)
    defined = gold_varies & answer_varies
    spread = (weights * _centred(weights, golds[None]) ** 2).sum(1)
    return {
        "pearson": np.where(defined, _pearson(weights, golds[None], answers[None]), 0),
        "spearman": np.where(defined, _pearson(weights, gold_ranks, answer_ranks), 0),
        "mae": weights @ abs(errors) / total,
        "rmse": np.sqrt(squares / total),
        "r2": np.where(gold_varies, 1 - _ratio(squares, spread), 0),
    }


def _ranks(weights: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(R, K) ranks of the K values, each repeated by its weight (equal values: the mean of their ranks).

    Also (R,) whether at least two different values have a weight. It is exact, unlike a variance of 0.
    """
    distinct, which = np.unique(values, return_inverse=True)
    count = np.arange(len(values))
    by_value = (sparse.csr_array((np.ones(len(count)), (which, count)), (len(distinct), len(count))) @ weights.T).T
    return (by_value.cumsum(1) - by_value / 2 + 0.5)[:, which], (by_value > 0).sum(1) > 1


def _centred(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(R, K) differences from the weighted mean; values: (R or 1, K)."""
    return values - (weights * values).sum(1, keepdims=True) / weights.sum(1, keepdims=True)


def _pearson(weights: np.ndarray, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    xs, ys = _centred(weights, xs), _centred(weights, ys)
    spread = (weights * xs**2).sum(1) * (weights * ys**2).sum(1)
    return _ratio((weights * xs * ys).sum(1), np.sqrt(spread)).clip(-1, 1)
