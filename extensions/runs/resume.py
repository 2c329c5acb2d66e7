"""How the run in a folder goes on: resumed, extended, forked, or refused (see FAULTS.md, "What may change")."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from extensions.common.errors import UserError
from extensions.common.files import read_json
from extensions.data.splits import RunData
from extensions.recipe import Change, Recipe, changes
from extensions.runs.checkpoint import checkpoint_folders, recover_replaced, step_of, verify_checkpoint

# Progress without a checkpoint: of evaluations; of encoders, finished tasks and epochs of the current one.
PARTS = ("*.part-*.jsonl", "tasks/*.json", "checkpoints/*/checkpoint-*")

MODEL, ADAPTER, CRITIC, REWARD, TRAINING_ROWS, EVALUATION_ROWS, DEEPSPEED = (
    "model",
    "model.adapter",
    "ppo.critic_from",
    "reward",
    "data",
    "evaluation rows",
    "deepspeed.config",
)  # the inputs of a run that versions.json has hashes of


def input_rows(data: RunData) -> dict[str, str | None]:
    """Hashes of a run's rows."""
    return {
        TRAINING_ROWS: data.fingerprint("train"),
        EVALUATION_ROWS: data.fingerprint("table", "validation", "test"),
    }


def evaluated_as(recipe: Recipe, data: RunData) -> dict[str, str]:
    """Digests of all that the scores of the table, of the validations and of yardsticks depend on, besides the weights.

    Equal digests: the scores of two sessions can be compared.
    """
    tasks = [task.model_dump(mode="json", exclude={"source"}) for task in recipe.data.tasks]
    settings = recipe.evaluation
    how = [tasks, recipe.prompt.model_dump(mode="json"), recipe.rollout.max_new_tokens, recipe.rollout.temperature]
    how += [recipe.seed, settings.decoding, settings.probabilities, data.demonstrations]
    parts = {
        "table": [how, data.fingerprint("table")],
        "validation": [how, settings.best_by, data.fingerprint("validation")],
        "train": [tasks, data.fingerprint("train")],
    }
    return {name: hashlib.sha256(repr(part).encode()).hexdigest() for name, part in parts.items()}


@dataclass(frozen=True)
class Continuation:
    """How a run goes on from a checkpoint, and what has changed since that was written."""

    kind: Literal["resumed", "extended", "forked"]
    step: int  # of the newest checkpoint
    keys: Sequence[Change]  # those with an effect
    inputs: Mapping[str, tuple[str | None, str | None]] = field(default_factory=dict)  # name -> sha256 before, now
    source: str | None = None  # of a fork
    length: str = ""  # what another number of iterations means

    @property
    def changes_anything(self) -> bool:
        return self.kind != "resumed" or bool(self.keys or self.inputs)

    def record(self) -> dict[str, Any]:
        """A line of changes.jsonl."""
        return {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "kind": self.kind,
            "step": self.step,
            "source": self.source,
            "keys": {change.key: [change.was, change.now] for change in self.keys},
            "inputs": {name: list(pair) for name, pair in self.inputs.items()},
        }

    def lines(self) -> list[str]:
        """What the user is told, one line per effect."""
        lines = []
        if self.kind == "extended":
            lines.append(f"extending the finished run, whose scores are kept in {scores_at(self.step)}")
        elif self.kind == "forked":
            lines.append(f"a fork of {self.source} after step {self.step}")
        consequences = {
            "learning": f"updates after step {self.step} follow the new values",
            "numerics": "memory and speed change, what is learned does not; bits may differ from an uninterrupted run "
            "(rounding, dropout masks)",
            "evaluation": f"evaluations after step {self.step} follow the new values",
            "length": self.length,
        }
        for effect, consequence in consequences.items():
            changed = "; ".join(str(change) for change in self.keys if change.effect == effect)
            if changed:
                lines.append(f"{changed}: {consequence}")
        for name, (was, now) in self.inputs.items():
            if not any(_explains(change, name) for change in self.keys):
                hashes = f"sha256 {str(was)[:12]} before, {str(now)[:12]} after step {self.step}"
                lines.append(f"{name}: the content of its files has changed ({hashes})")
        return lines


def _explains(change: Change, name: str) -> bool:
    """Whether a changed key explains that an input differs."""
    if name in (TRAINING_ROWS, EVALUATION_ROWS):
        evaluates = name == EVALUATION_ROWS and change.effect == "evaluation"
        return evaluates or change.key.startswith("data.")
    return change.key == ("model.path" if name == MODEL else name)


def _length(recipe: Recipe, steps: int | None) -> str:
    if recipe.schedule.epochs is None:
        return f"from here on the schedule is that of {steps} iterations"
    return f"the run has {steps} iterations; the learning rate goes on as before, by schedule.epochs"


def is_finished(root: Path) -> bool:
    """Whether the run in a folder is finished: eval.json is valid and has scores after training or evaluation."""
    return "after" in _scores(root)


def scores_at(step: int) -> str:
    """Name of the file that keeps the scores of a run that was extended after this step."""
    return f"eval-step-{step}.json"


def _scores(root: Path) -> dict[str, Any]:
    try:
        scores = read_json(root / "eval.json")
    except (FileNotFoundError, UserError):
        return {}
    return scores if isinstance(scores, dict) else {}


def continuation(
    root: Path, recipe: Recipe, versions: Mapping[str, Any], steps: int | None, warn: Callable[[str], None]
) -> Continuation | None:
    """How the run in a folder goes on by this recipe; None: it does not, and a new run takes its place.

    Args:
        versions: what versions.json holds for this run: packages, hashes of inputs.
        steps: iterations of this recipe; None: the method has none.

    Raises:
        UserError: the run is unfinished, and the recipe or an input has changed what is learned; or a finished run is
            to be extended and has no checkpoint; or files of the folder are damaged.
    """
    recover_replaced(root)
    if is_finished(root):
        return _extension(root, recipe, versions, steps)
    if not checkpoint_folders(root) and not any(path for pattern in PARTS for path in root.glob(pattern)):
        return None
    old, before = _recorded(root)
    step = _newest_step(root)
    keys, inputs = _compare(old, before, recipe, versions)
    refused = [change for change in keys if not _may_change(change, recipe)]
    other = [name for name in inputs if not _may_differ(name, keys, recipe, root, step)]
    if refused or other:
        raise UserError(_refusal(root, recipe, refused, other))
    _warn_of_packages(before, versions, warn)
    return Continuation("resumed", step, keys, inputs, length=_length(recipe, steps))


def _may_change(change: Change, recipe: Recipe) -> bool:
    trains = recipe.method in ("ppo", "sft")  # the answers of an evaluation are what its run computes
    return change.effect in (("numerics", "evaluation", "length") if trains else ("numerics",))


def _may_differ(name: str, keys: Sequence[Change], recipe: Recipe, root: Path, step: int) -> bool:
    """Whether a run may go on with this input changed."""
    if name == REWARD:
        return recipe.checkpoint.accept_changes or _reward_failed(root, step)
    return name == DEEPSPEED or (name == EVALUATION_ROWS and any(_explains(change, name) for change in keys))


def _reward_failed(root: Path, step: int) -> bool:
    """Whether the run ended by a fault of its reward, after this step."""
    for path in (root / "failed").glob("step-*/rank-*.json"):
        number = path.parent.name.removeprefix("step-")
        if number.isdecimal() and int(number) > step:
            try:
                problems = read_json(path)["problems"]
            except (UserError, KeyError, TypeError):
                continue
            if any(str(problem.get("tensor", "")).startswith("reward:") for problem in problems):
                return True
    return False


def _refusal(root: Path, recipe: Recipe, keys: Sequence[Change], inputs: Sequence[str]) -> str:
    message = f"{root} holds an unfinished run"
    if keys:
        listed = "\n".join(f"  {change}" for change in keys)
        message += (
            f" of another recipe. These keys change what it computes:\n{listed}\nTo resume it, use the old values."
        )
    if inputs:
        message += f"{' Its' if keys else ', and its'} inputs have changed since (sha256): {', '.join(inputs)}."
        message += " To resume it, restore the old ones."
        if REWARD in inputs:
            message += " --accept-changes after the recipe resumes it with the new reward."
    if recipe.method in ("ppo", "sft") and not any(change.effect == "structure" for change in keys):
        message += f" fork={root} starts a run of its own from its last checkpoint, with the changes."
    return f"{message} For a new run, choose another output_dir"


def _extension(root: Path, recipe: Recipe, versions: Mapping[str, Any], steps: int | None) -> Continuation | None:
    """A finished run goes on if the recipe asks for more iterations and is otherwise that of the run."""
    trained = _scores(root).get("training")
    done = trained.get("steps") if isinstance(trained, dict) else None
    if steps is None or not isinstance(done, int) or steps <= done:
        return None
    try:
        old, before = _recorded(root)
    except UserError:
        return None
    keys, inputs = _compare(old, before, recipe, versions)
    asked = any(change.effect == "length" or change.key == "evaluation.patience" for change in keys)
    same = all(_may_change(change, recipe) for change in keys)
    if not asked or not same or not all(_may_differ(name, keys, recipe, root, done) for name in inputs):
        return None
    if not checkpoint_folders(root):
        raise UserError(
            f"{root} holds a finished run of {done} iterations without a checkpoint, so it cannot be extended to "
            f"{steps}; for a new run, choose another output_dir"
        )
    return Continuation("extended", _newest_step(root), keys, inputs, length=_length(recipe, steps))


def fork_into(root: Path, recipe: Recipe, versions: Mapping[str, Any], steps: int | None) -> Continuation:
    """Copy the newest intact checkpoint of `recipe.fork`, and the records before it, into a new run folder.

    Raises:
        UserError: see `fork_source`; or no checkpoint is intact.
    """
    source, checkpoints = fork_source(recipe, versions)
    old, before = _recorded(source)
    target = root / "checkpoints"
    shutil.rmtree(target, ignore_errors=True)  # left by a kill
    for folder in reversed(checkpoints):
        try:
            shutil.copytree(folder, target / folder.name)
        except (shutil.Error, FileNotFoundError):  # shutil's holds the error of each file
            if folder.exists():
                raise
        problems = verify_checkpoint(target / folder.name)  # the source may run, and remove it
        if not problems:
            step = step_of(folder)
            break
        shutil.rmtree(target, ignore_errors=True)
    else:
        raise UserError(f"fork: of the checkpoints of {source}, none is intact ({'; '.join(problems)})")
    for name in ("metrics.jsonl", "rollouts.jsonl", "validation.jsonl", "predictions_before.jsonl"):
        if (source / name).exists():
            shutil.copyfile(source / name, root / name)  # cut back to the step when the checkpoint is loaded
    keys, inputs = _compare(old, before, recipe, versions)
    return Continuation("forked", step, keys, inputs, str(source), _length(recipe, steps))


_INSTEAD = "To start from a run's weights instead: model.adapter=RUN/adapter"


def fork_source(recipe: Recipe, versions: Mapping[str, Any] | None = None) -> tuple[Path, list[Path]]:
    """The run folder of key `fork`, and the checkpoints to try, oldest first.

    Args:
        versions: what versions.json holds for this run; None: its inputs count as those of the source.

    Raises:
        UserError: it is no run folder or has no checkpoint, or its checkpoints do not fit this recipe or model.
    """
    assert recipe.fork is not None
    named = Path(recipe.fork)
    single = named.parent.name == "checkpoints"
    source = named.parent.parent if single else named
    if not (source / "recipe.yaml").is_file():
        raise UserError(
            f"fork: {source.absolute()} is no run folder (it has no recipe.yaml); name one, such as runs/NAME"
        )
    checkpoints = [path for path in checkpoint_folders(source) if not single or path.name == named.name]
    if not checkpoints:
        raise UserError(
            f"fork: {named} has no checkpoint to go on from; see checkpoint.every_steps, and {source / 'checkpoints'}"
        )
    old, before = _recorded(source)
    keys, inputs = _compare(old, before, recipe, versions or before)
    structure = [change for change in keys if change.effect == "structure"]
    if structure:
        listed = "\n".join(f"  {change}" for change in structure)
        raise UserError(f"fork: the checkpoints of {source} do not fit these keys:\n{listed}\n{_INSTEAD}")
    other = [name for name in (MODEL, ADAPTER, CRITIC) if name in inputs]
    if other:
        raise UserError(f"fork: {source} was trained on other files (sha256): {', '.join(other)}. {_INSTEAD}")
    return source, checkpoints


def _recorded(root: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Content of a run's recipe.yaml and versions.json."""
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
    return old, before


def _compare(
    old: Mapping[str, Any], before: Mapping[str, Any], recipe: Recipe, versions: Mapping[str, Any]
) -> tuple[list[Change], dict[str, tuple[str | None, str | None]]]:
    """The keys that have changed, but those without an effect, and the inputs; a path counts by its content."""
    was, now = before["inputs"], versions["inputs"]
    inputs = {name: (was[name], digest) for name, digest in now.items() if name in was and was[name] != digest}
    moved = {
        name
        for name in (REWARD, ADAPTER, CRITIC, DEEPSPEED)
        if now.get(name) is not None and now[name] == was.get(name)
    }
    return [one for one in changes(old, recipe) if one.effect != "none" and one.key not in moved], inputs


def _warn_of_packages(before: Mapping[str, Any], versions: Mapping[str, Any], warn: Callable[[str], None]) -> None:
    was, now = before.get("packages", {}), versions["packages"]
    packages = [f"{name} was {was.get(name)}, is {now[name]}" for name in now if was.get(name) != now[name]]
    if packages:
        warn(f"package versions changed since the run began, so the result may not be identical: {'; '.join(packages)}")


def _newest_step(root: Path) -> int:
    folders = checkpoint_folders(root)
    return step_of(folders[-1]) if folders else 0
