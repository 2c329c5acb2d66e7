"""System under test: this project. A job is a recipe; an iteration is the trainer's own."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worker import serve

from extensions.common.environment import prepare_environment
from extensions.recipe import load_recipe
from extensions.runs.build import prepare
from extensions.runs.training_run import TrainingRun


def load(job: dict[str, Any]) -> Callable[[int], dict[str, Any]]:
    prepare_environment()
    recipe = load_recipe(Path(job["recipe"]), job["overrides"], job["method"])
    training = prepare(recipe)
    assert isinstance(training, TrainingRun)
    trainer = training.trainer
    if job["method"] == "ppo":  # responses of full length, as the peer's
        trainer.sampler.eos, trainer.sampler.may_stop = set(), set()  # type: ignore[attr-defined]
    clock = time.process_time if job.get("cpu_time") else time.perf_counter
    weights = sum(p.nbytes for name, p in trainer.policy.lm.named_parameters() if "lora_" not in name)
    assert weights == sum(p.nbytes for p in trainer.policy.lm.get_base_model().parameters() if not p.requires_grad)
    causal_lm = trainer.policy.causal_lm
    head, embeddings = causal_lm.get_output_embeddings().weight, causal_lm.get_input_embeddings().weight
    base = sum(p.numel() for name, p in causal_lm.named_parameters() if "lora_" not in name)
    trunk = base - embeddings.numel() - (0 if head is embeddings else head.numel())
    parameters = {"head": head.numel(), "trunk": trunk}

    def iterate(step: int) -> dict[str, Any]:
        start = clock()
        metrics, _ = trainer.iterate(step)
        seconds = clock() - start
        if "save" in job:
            trainer.policy.save_adapter(Path(job["save"]) / "adapter", trainer.weights())
        tokens = {kind: metrics.get(f"{kind}_tokens") for kind in ("packed", "logical")}  # of PPO
        return {"seconds": seconds, "phases": metrics["seconds"], "weights_gb": weights / 2**30, **parameters, **tokens}

    return iterate


if __name__ == "__main__":
    serve(load)
