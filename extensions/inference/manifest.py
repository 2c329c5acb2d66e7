"""`nlu.json`, the manifest of an adapter or a merged model: what inference needs besides the weights.

Tasks, prompt format with its demonstrations, decoding, calibration, and the identity of the base model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from huggingface_hub import try_to_load_from_cache
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from extensions.common.errors import UserError
from extensions.common.files import read_json, sha256, write_json
from extensions.common.versions import __version__, versions
from extensions.model.loading import load_config, resolve_model
from extensions.prompts import PromptEncoder
from extensions.recipe import MANIFEST, Model, Recipe
from extensions.tasks import Task

FILE_NAME = MANIFEST
FORMAT = 1  # to be increased if older readers would misread the file
HERE = "."  # base path of a merged model: the manifest's own folder


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Base(_Part):
    """The base model of the adapter."""

    path: str = Field(description="as model.path of the recipe; '.': the folder of this file, a merged model")
    sha256: str | None = Field(None, description="of the GGUF file, or of the weight files and config.json in order")
    revision: str | None = Field(None, description="commit on the hub")
    dtype: Literal["float32", "bfloat16"] = Field(description="dtype that training computed in")
    attn_implementation: Literal["auto", "eager", "sdpa"] = Field(description="model.attn_implementation")
    load_in_4bit: bool = Field(description="model.load_in_4bit")


class PromptForm(_Part):
    """How a row becomes a prompt."""

    chat_template: bool = Field(description="prompt.chat_template")
    template_options: dict[str, Any] = Field(description="prompt.template_options")
    max_tokens: int = Field(ge=1, description="longest prompt, as the run resolved it")
    shots: int = Field(ge=0, description="prompt.shots")
    demonstrations: dict[str, list[tuple[dict[str, str], str]]] = Field(
        description="task -> (fields, answer) of the demonstrations in its prompts"
    )


class Manifest(_Part):
    """The content of the file."""

    format: int = Field(description="of the file")
    project: str = Field(description="version of the project that wrote it")
    packages: dict[str, str | None] = Field(description="versions of its dependencies")
    base: Base = Field(description="the model without the adapter")
    tasks: list[Task] = Field(min_length=1, description="as in a recipe, with all defaults filled in")
    prompt: PromptForm = Field(description="how a row becomes a prompt")
    decoding: Literal["sample", "greedy", "likelihood"] = Field(description="of the run's own evaluation")
    max_new_tokens: int = Field(ge=1, description="longest sampled answer")
    sampling_temperature: float = Field(gt=0, description="of sampling, and of every log-probability")
    seed: int = Field(ge=0, description="of sampling")
    calibration: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)] | None] = Field(
        description="task -> temperature that divides the answers' log-probabilities; null: not fitted"
    )
    label_sets: dict[str, list[str]] = Field(description="multi-label task -> label sets of its training rows")

    @model_validator(mode="after")
    def _distinct(self) -> Manifest:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"two tasks have the same name ({', '.join(names)})")
        return self

    def task(self, name: str | None) -> Task:
        """The task of this name; with None, the only task.

        Raises:
            UserError: no task has this name, or there are several and `name` is None.
        """
        names = [task.name for task in self.tasks]
        if name is None and len(names) > 1:
            raise UserError(f"the model has {len(names)} tasks; name one with --task: {', '.join(names)}")
        found = [task for task in self.tasks if name in (None, task.name)]
        if not found:
            raise UserError(f"--task: {name!r} is not a task of the model; its tasks are: {', '.join(names)}")
        return found[0]

    @classmethod
    def of_run(
        cls,
        recipe: Recipe,
        encoder: PromptEncoder,
        dtype: Literal["float32", "bfloat16"],
        label_sets: Mapping[str, Sequence[str]],
    ) -> Manifest:
        """The manifest of a finished training.

        Args:
            dtype: dtype of the base in training.
            label_sets: multi-label task -> label sets of its training rows.

        Raises:
            UserError: the files of the base model can no longer be read.
        """
        model, digest, revision = recipe.model, *fingerprint(recipe.model)
        settings = model.model_dump(include={"path", "attn_implementation", "load_in_4bit"})
        shown = {name: [(dict(fields), text) for fields, text in rows] for name, rows in encoder.demonstrations.items()}
        return cls(
            format=FORMAT,
            project=__version__,
            packages=versions()["packages"],
            base=Base(**settings, dtype=dtype, sha256=digest, revision=revision),
            tasks=list(recipe.data.tasks),
            prompt=PromptForm(
                **recipe.prompt.model_dump(include={"chat_template", "template_options"}),
                max_tokens=encoder.max_tokens,
                shots=encoder.shots,
                demonstrations=shown,
            ),
            decoding=recipe.evaluation.decoding,
            max_new_tokens=recipe.rollout.max_new_tokens,
            sampling_temperature=recipe.rollout.temperature,
            seed=recipe.seed,
            calibration={task.name: None for task in recipe.data.tasks},
            label_sets={name: list(sets) for name, sets in label_sets.items() if sets},
        )

    def save(self, folder: Path) -> None:
        """Write the file. Raises OSError if that fails."""
        write_json(folder / FILE_NAME, self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            UserError: it is missing or damaged, or a newer version of the project wrote it.
        """
        path = folder / FILE_NAME
        try:
            content = read_json(path)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror or error}); training writes it beside the adapter. Take a "
                "folder that has it, or train again with this version"
            ) from error
        if not isinstance(content, dict) or type(content.get("format")) is not int:
            raise UserError(f"{path}: damaged, expected an object with the number `format`; copy the folder again")
        if content["format"] > FORMAT:
            raise UserError(
                f"{path}: format {content['format']}, written by version {content.get('project')} of the project; "
                f"this version ({__version__}) reads format {FORMAT}: update it"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            found = [f"{'.'.join(map(str, e['loc']))}: {e['msg'][:1].lower()}{e['msg'][1:]}" for e in error.errors()]
            raise UserError(
                f"{path}: damaged, or of another version of the project ({content.get('project')}; this is "
                f"{__version__}): {'; '.join(found[:5])}. Copy the folder again, or use that version"
            ) from error

    def check_base(self, model: Model, folder: Path) -> None:
        """Compare the base model with that of the training, by hash or commit.

        Args:
            folder: folder of the adapter, for messages.

        Raises:
            UserError: it is a different model.
        """
        base, (digest, revision) = self.base, fingerprint(model)
        if digest is not None and base.sha256 is not None:
            same, found, wanted = digest == base.sha256, f"sha256 {digest[:16]}...", f"{base.sha256[:16]}..."
        elif revision is not None and base.revision is not None:
            same, found, wanted = revision == base.revision, f"commit {revision}", base.revision
        else:  # not comparable: one is a folder, the other a hub name that is no longer cached
            return
        if not same:
            more = f" (hf download {base.path} --revision {base.revision})" if base.revision else ""
            what = "has changed since it was merged" if base.path == HERE else "is not the model that it was trained on"
            raise UserError(
                f"{folder}: {model.path!r} {what}: {found}, expected {wanted}. Give the base model itself, "
                f"{base.path!r}{more}, with --model"
            )


def write_merged_manifest(adapter: str, merged: Path, warn: Callable[[str], None]) -> None:
    """Write an adapter's manifest into the folder of the merged model, which is its own base.

    Raises:
        UserError: the manifest of the adapter is damaged.
    """
    if not (Path(adapter) / FILE_NAME).exists():
        warn(f"{adapter} has no {FILE_NAME}, which training writes; `nlu predict` cannot use the merged model")
        return
    before = Manifest.load(Path(adapter))
    base = before.base.model_copy(update={"path": HERE, "sha256": _digest(merged), "revision": None})
    before.model_copy(update={"base": base}).save(merged)


def fingerprint(model: Model) -> tuple[str | None, str | None]:
    """sha256 of a model's files, and its commit if it is on the hub.

    The digest covers the GGUF file, or the names and contents of the weight files and config.json. A hub model in the
    local cache has both, so a local copy of it is recognised.

    Raises:
        UserError: the model cannot be found.
    """
    folder, gguf = resolve_model(model.path)
    if gguf is not None:
        return sha256(Path(folder) / gguf), None
    if Path(folder).is_dir():
        return _digest(Path(folder)), None
    revision = getattr(load_config(model), "_commit_hash", None)
    cached = try_to_load_from_cache(folder, "config.json", revision=revision)
    return (_digest(Path(cached).parent) if isinstance(cached, str) else None), revision


def _digest(folder: Path) -> str | None:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    digest = hashlib.sha256()
    try:
        for file in [*files, folder / "config.json"]:
            digest.update(f"{file.name} {sha256(file)}\n".encode())
    except OSError as error:
        raise UserError(
            f"{error.filename}: cannot be read ({error.strerror}); is this the folder of a model?"
        ) from error
    return digest.hexdigest()
