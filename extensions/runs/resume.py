"""Whether the run in a folder can be resumed (see FAULTS.md, "Resume")."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from extensions.common.errors import UserError
from extensions.common.files import read_json
from extensions.recipe import MAY_CHANGE, Recipe, dump_recipe
from extensions.runs.checkpoint import checkpoint_folders, recover_replaced
from extensions.runs.trackers import flattened

# Progress without a checkpoint: of evaluations; of encoders, finished tasks and epochs of the current one.
PARTS = ("*.part-*.jsonl", "tasks/*.json", "checkpoints/*/checkpoint-*")


def is_finished(root: Path) -> bool:
    """Whether the run in a folder is finished: eval.json is valid and has scores after training or evaluation."""
    try:
        scores = read_json(root / "eval.json")
    except (FileNotFoundError, UserError):
        return False
    return isinstance(scores, dict) and "after" in scores


def can_resume(root: Path, recipe: Recipe, versions: Mapping[str, Any], warn: Callable[[str], None]) -> bool:
    """Whether the run in a folder is unfinished and left something to resume from.

    Args:
        versions: what versions.json holds for this run: packages, hashes of inputs.

    Raises:
        UserError: it is another run, or its inputs have changed, so the result would differ; or its files are damaged.
    """
    if is_finished(root):
        return False
    recover_replaced(root)
    if not checkpoint_folders(root) and not any(path for pattern in PARTS for path in root.glob(pattern)):
        return False
    try:
        old = yaml.safe_load((root / "recipe.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError):
        old = None
    if not isinstance(old, dict):
        raise UserError(
            f"{root / 'recipe.yaml'} is damaged, so the run cannot be resumed; restore the recipe of that run, or "
            "choose another output_dir"
        )
    before = read_json(root / "versions.json")
    if not isinstance(before, dict) or not isinstance(before.get("inputs"), dict):
        raise UserError(f"{root / 'versions.json'} is damaged, so the run cannot be resumed; choose another output_dir")
    a, b = flattened(old), flattened(yaml.safe_load(dump_recipe(recipe)))
    changed = [
        f"  {key}: was {a.get(key)!r}, is {b.get(key)!r}"
        for key in sorted({*a, *b})
        if a.get(key) != b.get(key) and not any(key == one or key.startswith(f"{one}.") for one in MAY_CHANGE)
    ]
    if changed:
        raise UserError(
            f"{root} holds an unfinished run of another recipe; to resume it, use the same recipe, and to start a new "
            "run, choose another output_dir. Changed keys:\n"
            + "\n".join(changed)
            + f"\nThese may change: {', '.join(MAY_CHANGE)}"
        )
    other = [name for name, digest in versions["inputs"].items() if before["inputs"].get(name) != digest]
    if other:
        raise UserError(
            f"{root} holds an unfinished run, and its inputs have changed since (sha256): {', '.join(other)}. Restore "
            "the old ones to resume it, or choose another output_dir"
        )
    was, now = before.get("packages", {}), versions["packages"]
    packages = [f"{name} was {was.get(name)}, is {now[name]}" for name in now if was.get(name) != now[name]]
    if packages:
        warn(f"package versions changed since the run began, so the result may not be identical: {'; '.join(packages)}")
    return True
