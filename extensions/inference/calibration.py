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
from extensions.evaluation.calibration import reliability
from extensions.evaluation.likelihood import candidates, label_index
from extensions.inference.predictor import Predictor
from extensions.recipe import Evaluation, load_recipe
from extensions.tasks import Task

LOWEST, HIGHEST = 0.05, 20.0  # bounds of the temperature


@dataclass(frozen=True)
class Fit:
    """A fitted temperature; negative log-likelihood (nats) and expected calibration error before and after."""

    temperature: float
    num_rows: int
    num_wrong: int  # rows whose most probable answer is wrong
    nll: tuple[float, float]
    ece: tuple[float, float]

    def __str__(self) -> str:
        if not self.num_wrong:
            return f"temperature 1: all {self.num_rows} validation rows are answered right, so there is nothing to fit"
        edge = "" if LOWEST * 1.01 < self.temperature < HIGHEST * 0.99 else ", at the bound of the search"
        return (
            f"temperature {self.temperature:.3f}{edge}, fitted on {self.num_rows} validation rows: "
            f"NLL {self.nll[0]:.4f} -> {self.nll[1]:.4f} nats, ECE {self.ece[0]:.4f} -> {self.ece[1]:.4f}"
        )


def fit(logprobs: Tensor, golds: Sequence[int]) -> Fit:
    """The temperature that minimises the negative log-likelihood; 1 if all answers are right, when the minimum is at 0.

    Args:
        logprobs: (rows, C), from `likelihood.log_likelihoods`.
        golds: index of each row's gold answer among the C candidates.
    """
    scores, targets = logprobs.double().cpu(), torch.tensor(golds)

    def nll(temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(scores / temperature, targets))

    # The loss is convex in the inverse temperature, so it has a single minimum in the log temperature.
    bounds = (float(np.log(LOWEST)), float(np.log(HIGHEST)))
    found = minimize_scalar(lambda log: nll(float(np.exp(log))), bounds=bounds, method="bounded")
    wrong = int((scores.argmax(-1) != targets).sum())
    temperature = float(np.exp(found.x)) if wrong else 1.0
    before, after = (reliability((scores / t).softmax(-1).numpy(), targets.numpy())[0] for t in (1.0, temperature))
    return Fit(temperature, len(golds), wrong, (nll(1.0), nll(temperature)), (before, after))


def fit_on_validation(
    predictor: Predictor, task: Task, warn: Callable[[str], None], progress: Callable[[int], None]
) -> Fit:
    """Fit on the validation rows of the run's recipe.

    Raises:
        UserError: there are none, or none has a gold answer among the candidates.
    """
    compared = candidates(task, predictor.manifest.label_sets.get(task.name, ()))
    examples = validation_rows(predictor.location.recipe, task, warn)
    indices = {example.index: label_index(compared, str(example.label)) for example in examples}
    kept = [example for example in examples if indices[example.index] is not None]
    if not kept:
        raise UserError(f"--temperature auto: no validation row of task {task.name} has one of its answers as label")
    parts: list[Tensor] = []
    golds: list[int] = []
    for batch in in_batches(kept, Evaluation().batch_size):
        parts.append(predictor.log_likelihoods(compared, batch).cpu())
        golds += [index for example in batch if (index := indices[example.index]) is not None]
        progress(len(batch))
    return fit(torch.cat(parts), golds)


def validation_rows(recipe: Path | None, task: Task, warn: Callable[[str], None]) -> list[Example]:
    """The labelled validation rows of a run's recipe.

    Raises:
        UserError: there is no recipe, or the rows cannot be read.
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
