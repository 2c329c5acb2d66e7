"""Metrics to TensorBoard, wandb and trackio. A tracker that fails is dropped with a warning and never stops the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from extensions.common.errors import UserError
from extensions.recipe import Recipe


class Trackers:
    """The trackers of a run, none before `start`.

    Args:
        warn: called with a message for each tracker that fails.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self.active: dict[str, Any] = {}  # name -> object with the `log` and `finish` of wandb

    def start(self, recipe: Recipe, folder: Path, run_id: str, step: int) -> None:
        """Start the trackers that the recipe enables.

        Args:
            folder: of TensorBoard's files.
            step: where the run resumes; later steps of a killed session are hidden where the tracker can do that.

        Raises:
            UserError: a tracker is not installed.
        """
        if recipe.logging.tensorboard:
            self.active["TensorBoard"] = _TensorBoard(folder, step)
        for name in ("wandb", "trackio"):
            if getattr(recipe.logging, name):
                tracker, own_id = _imported(name), {"id": f"{recipe.name}-{run_id}"} if name == "wandb" else {}
                config = recipe.model_dump(mode="json")
                tracker.init(project="nlu-ppo", name=recipe.name, config=config, resume="allow", **own_id)
                self.active[name] = tracker

    def log(self, record: dict[str, Any]) -> None:
        """The numbers of one iteration, nested names joined by dots."""
        numbers = {k: v for k, v in flattened(record).items() if isinstance(v, (int, float)) and k != "step"}
        for name, tracker in list(self.active.items()):
            try:
                tracker.log(numbers, step=record["step"])
            except Exception as error:
                self._warn(f"{name} failed and is no longer used: {type(error).__name__}: {error}")
                del self.active[name]

    def finish(self) -> None:
        for name, tracker in self.active.items():
            try:
                tracker.finish()
            except Exception as error:
                self._warn(f"{name} did not finish: {type(error).__name__}: {error}")
        self.active.clear()


class _TensorBoard:
    """TensorBoard behind the two calls that wandb and trackio share."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name.replace(".", "/"), value, step)

    def finish(self) -> None:
        self.writer.close()


def _imported(name: str) -> Any:
    try:
        if name == "wandb":
            import wandb

            return wandb
        import trackio

        return trackio
    except ImportError as error:
        raise UserError(f"logging.{name}: true, but {name} is not installed: pip install {name}") from error


def flattened(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested record with one key per value, such as `ppo.kl.init`."""
    pairs: dict[str, Any] = {}
    for key, value in record.items():
        pairs |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return pairs
