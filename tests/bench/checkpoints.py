"""What a checkpoint costs beside a step: SmolLM2-135M, PPO on the reviews of recipes/quickstart.yaml.

    python tests/bench/checkpoints.py [--steps 4] [key.sub=value ...]

Prints seconds of a step and of a checkpoint (medians, in one run), their ratio, and the bytes of a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from extensions.common.environment import prepare_environment  # noqa: E402

prepare_environment()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from extensions.recipe import load_recipe  # noqa: E402
from extensions.runs.build import prepare  # noqa: E402
from extensions.runs.checkpoint import checkpoint_folders  # noqa: E402
from extensions.runs.training_run import TrainingRun  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:  # a disk, not memory
        fixed = [f"max_steps={options.steps}", "checkpoint.every_steps=1", f"output_dir={folder}/run"]
        quick = ["evaluation.before=false", "evaluation.max_samples=1", "logging.tensorboard=false"]
        recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", [*fixed, *quick, *options.overrides], "ppo")
        run = prepare(recipe)
        assert isinstance(run, TrainingRun)
        seconds: dict[str, list[float]] = {"step": [], "checkpoint": []}
        for name, method in (("step", "_iterate"), ("checkpoint", "save_checkpoint")):

            def timed(name: str = name, real: object = getattr(run, method)) -> object:
                start = time.perf_counter()
                result = real()  # type: ignore[operator]
                seconds[name].append(time.perf_counter() - start)
                return result

            setattr(run, method, timed)
        run.go()
        size = sum(path.stat().st_size for path in checkpoint_folders(Path(folder) / "run")[-1].iterdir())
    step, checkpoint = (statistics.median(seconds[name][1:]) for name in ("step", "checkpoint"))
    found = {"step_s": round(step, 3), "checkpoint_s": round(checkpoint, 4), "mb": round(size / 1e6, 1)}
    print(json.dumps(found | {"share_of_a_step": round(checkpoint / step, 4), "optimizer": recipe.optimizer.name}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
