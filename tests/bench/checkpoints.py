"""Cost of a checkpoint relative to a step: SmolLM2-135M, PPO on the reviews of recipes/quickstart.yaml.

    python tests/bench/checkpoints.py [--steps 4] [key.sub=value ...]

Medians of one run, without the first step and checkpoint.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from extensions.common.environment import prepare_environment

prepare_environment()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jobs import ROOT, make_model, parse  # noqa: E402
from worker import table  # noqa: E402

from extensions.recipe import load_recipe  # noqa: E402
from extensions.runs import checkpoint as checkpoint_files  # noqa: E402
from extensions.runs.build import prepare  # noqa: E402
from extensions.runs.checkpoint import checkpoint_folders  # noqa: E402
from extensions.runs.training_run import TrainingRun  # noqa: E402

OPTIONS = [
    ("--steps", {"type": int, "default": 4}),
    ("overrides", {"nargs": "*", "metavar": "KEY=VALUE"}),
]


def timed(work: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def measured(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = work(*arguments)
        seconds.append(time.perf_counter() - start)
        return result

    return measured


def main() -> None:
    args = parse(__doc__, OPTIONS, steps=2)
    model = [f"model.path={make_model('tiny', args.folder)}", "ppo.batch_size=4"] if args.tiny else []
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:  # on a disk: /tmp may be in memory
        fixed = [f"max_steps={args.steps}", "checkpoint.every_steps=1", f"output_dir={folder}/run"]
        quick = ["evaluation.before=false", "evaluation.max_samples=1", "logging.tensorboard=false"]
        recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", [*fixed, *quick, *model, *args.overrides], "ppo")
        run = prepare(recipe)
        assert isinstance(run, TrainingRun)
        steps: list[float] = []
        checkpoints: list[float] = []
        run.trainer.iterate = timed(run.trainer.iterate, steps)  # type: ignore[method-assign]
        run.save_checkpoint = timed(run.save_checkpoint, checkpoints)  # type: ignore[method-assign]
        portable: list[float] = []
        checkpoint_files.write_portable = timed(checkpoint_files.write_portable, portable)
        run.go()
        last = checkpoint_folders(Path(folder) / "run")[-1]
        size = sum(path.stat().st_size for path in last.iterdir())
        copy = (last / checkpoint_files.PORTABLE).stat().st_size
    step, checkpoint = statistics.median(steps[1:]), statistics.median(checkpoints[1:])
    columns = ["optimizer", "s/step", "s/checkpoint", "checkpoint / step", "MB per checkpoint", "portable copy"]
    figures = [f"{step:.3f}", f"{checkpoint:.4f}", f"{checkpoint / step:.4f}", f"{size / 1e6:.1f}"]
    figures.append(f"{statistics.median(portable[1:]):.4f} s, {copy / 1e6:.1f} MB")
    print(table(columns, [[recipe.optimizer.name, *figures]]))


if __name__ == "__main__":
    main()
