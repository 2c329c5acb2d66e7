"""Temperature scaling of the answers' probabilities (Guo et al., 2017), fitted on the validation rows of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from extensions.common.errors import UserError
from extensions.data import Example, is_labelled, load_examples
from extensions.evaluation.answers import in_batches
from extensions.evaluation.likelihood import Candidates, candidates, label_index
from extensions.inference.predictor import Predictor
from extensions.recipe import Evaluation, load_recipe
from extensions.tasks import Task

BINS = 15  # of the expected calibration error, of equal width
LOWEST, HIGHEST = 0.05, 20.0  # temperatures that are tried


@dataclass(frozen=True)
class Fit:
    """A fitted temperature, with negative log-likelihood (nats) and expected calibration error at 1 and at it."""

    temperature: float
    rows: int
    wrong: int  # of these rows' most probable answers
    nll: tuple[float, float]
    ece: tuple[float, float]

    def __str__(self) -> str:
        if not self.wrong:
            return (
                f"temperature 1: all {self.rows} validation rows are answered right, so there is nothing to fit it by"
            )
        edge = "" if LOWEST * 1.01 < self.temperature < HIGHEST * 0.99 else ", at the edge of what is tried"
        return (
            f"temperature {self.temperature:.3f}{edge}, fitted on {self.rows} validation rows: "
            f"NLL {self.nll[0]:.4f} -> {self.nll[1]:.4f} nats, ECE {self.ece[0]:.4f} -> {self.ece[1]:.4f}"
        )


def fit(logprobs: Tensor, golds: Sequence[int]) -> Fit:
    """The temperature of least negative log-likelihood; 1 where every answer is right, for then the least would make
    every answer certain.

    Args:
        logprobs: (rows, C) of `likelihood.log_likelihoods`.
        golds: place of each row's gold answer among the C.
    """
    scores, right = logprobs.double().cpu(), torch.tensor(golds)

    def nll(temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(scores / temperature, right))

    # In the logarithm the loss has one minimum (it is convex in the inverse temperature).
    bounds = (float(np.log(LOWEST)), float(np.log(HIGHEST)))
    found = minimize_scalar(lambda log: nll(float(np.exp(log))), bounds=bounds, method="bounded")
    wrong = int((scores.argmax(-1) != right).sum())
    temperature = float(np.exp(found.x)) if wrong else 1.0
    eces = [expected_calibration_error((scores / t).softmax(-1), right) for t in (1.0, temperature)]
    return Fit(temperature, len(golds), wrong, (nll(1.0), nll(temperature)), (eces[0], eces[1]))


def expected_calibration_error(chances: Tensor, golds: Tensor) -> float:
    """Mean distance of confidence and accuracy over `BINS` bins of the confidence, weighted by their rows.

    Args:
        chances: (rows, C); golds: (rows,).
    """
    confidences, answers = chances.max(-1)
    right = (answers == golds).double()
    bins = (confidences * BINS).long().clamp(max=BINS - 1)
    total = 0.0
    for k in bins.unique():
        inside = bins == k
        total += float((confidences[inside].mean() - right[inside].mean()).abs() * inside.sum())
    return total / len(golds)


def fit_on_validation(
    predictor: Predictor, task: Task, warn: Callable[[str], None], progress: Callable[[int], None]
) -> Fit:
    """Fit on the validation rows that the run's recipe names.

    Raises:
        UserError: they are not there, or none has a gold answer among those that are compared.
    """
    examples = validation_rows(predictor.location.recipe, task, warn)
    compared = candidates(task, predictor.handed.label_sets.get(task.name, ()))
    kept, parts = _with_gold(compared, examples), []
    if not kept:
        raise UserError(f"--temperature auto: no validation row of task {task.name} has a gold answer to compare with")
    golds = []
    for batch in in_batches([example for example, _ in kept], Evaluation().batch_size):
        place = {example.index: gold for example, gold in kept}
        parts.append(predictor.log_likelihoods(compared, batch).cpu())
        golds += [place[example.index] for example in batch]
        progress(len(batch))
    return fit(torch.cat(parts), golds)


def validation_rows(recipe: Path | None, task: Task, warn: Callable[[str], None]) -> list[Example]:
    """The labelled validation rows of a run's recipe.

    Raises:
        UserError: there is no recipe, or the rows are not there.
    """
    why = "--temperature auto fits on the validation rows of the run"
    if recipe is None:
        raise UserError(
            f"{why}, which its recipe names, and there is no recipe.yaml here; name the run folder (runs/NAME). The "
            "fitted temperature is stored with the adapter"
        )
    found = load_recipe(recipe)
    own = next((one for one in found.data.tasks if one.name == task.name), task)
    if not is_labelled(own, "validation"):
        raise UserError(
            f"{why}, and task {own.name} has no labelled validation split; give source.files.validation or "
            "source.split.validation in the recipe and train again"
        )
    try:
        return load_examples(own, "validation", found.data.root, found.seed, warn)
    except UserError as error:
        raise UserError(f"{why}, and these cannot be read ({recipe}): {error}") from error


def _with_gold(compared: Candidates, examples: Sequence[Example]) -> list[tuple[Example, int]]:
    found = []
    for example in examples:
        place = label_index(compared, str(example.label))
        if place is not None:
            found.append((example, place))
    return found
