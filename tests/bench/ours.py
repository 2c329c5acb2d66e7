"""Contestant: this project. A job is a recipe; an iteration is the trainer's own."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worker import serve

from extensions.common.environment import prepare_environment
from extensions.distributed.strategy import trainable_state
from extensions.recipe import load_recipe
from extensions.runs.build import prepare
from extensions.runs.training_run import TrainingRun


def load(job: dict[str, Any]) -> Callable[[int], dict[str, Any]]:
    prepare_environment()
    recipe = load_recipe(Path(job["recipe"]), job["overrides"], job["method"])
    training = prepare(recipe)
    assert isinstance(training, TrainingRun)
    if job["method"] == "ppo":
        training.trainer.sampler._ends = lambda tokens: False  # type: ignore[attr-defined]  # as long as the peer's
    parameters = training.trainer.policy.lm.get_base_model().parameters()
    weights = sum(p.nbytes for name, p in training.trainer.policy.lm.named_parameters() if "lora_" not in name)
    assert weights == sum(p.nbytes for p in parameters if not p.requires_grad)

    def iterate(step: int) -> dict[str, Any]:
        start = time.perf_counter()
        metrics, _ = training.trainer.iterate(step)
        if "save" in job:
            training.trainer.policy.save_adapter(
                Path(job["save"]) / "adapter", trainable_state(training.trainer.policy)
            )
        return {"seconds": time.perf_counter() - start, "phases": metrics["seconds"], "weights_gb": weights / 2**30}

    return iterate


if __name__ == "__main__":
    serve(load)
