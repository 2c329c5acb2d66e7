"""The location of a trained model: a run folder, an adapter folder, or a merged model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from extensions.common.errors import UserError
from extensions.inference.manifest import HERE, Manifest
from extensions.recipe import Model
from extensions.recipe.paths import is_hub_name


@dataclass(frozen=True)
class Location:
    """A trained model on disk."""

    folder: Path  # holds the manifest and the tokenizer
    merged: bool = False  # a whole model, not an adapter
    recipe: Path | None = None  # recipe of its run, if known
    note: str | None = None  # message if another folder than the named one is used


def locate(path: str | Path) -> Location:
    """The model in a folder. If `runs/NAME` does not exist, `runs/NAME-sft` is used.

    Raises:
        UserError: the folder holds no model.
    """
    named = Path(path)
    sft = named.with_name(f"{named.name}-sft")
    if not named.exists() and _is_adapter(sft / "adapter"):
        note = f"{named} is not there; answering with {sft}, the supervised run of the same name"
        return Location(sft / "adapter", recipe=_recipe_in(sft), note=note)
    if _is_adapter(named / "adapter"):
        return Location(named / "adapter", recipe=_recipe_in(named))
    if _is_adapter(named):
        return Location(named, recipe=_recipe_in(named.resolve().parent))
    if (named / "config.json").is_file():
        return Location(named, merged=True)
    if not named.exists():
        raise UserError(f"{named}: no such folder; name a run (runs/NAME), an adapter or a merged model")
    more = f"; {sft} has one" if _is_adapter(sft / "adapter") else ""
    if (named / "recipe.yaml").is_file():
        raise UserError(
            f"{named}: this run has no adapter: it is unfinished, or trained none (evaluation, encoder){more}"
        )
    raise UserError(f"{named}: neither a run folder, nor an adapter, nor a merged model{more}")


def base_of(location: Location, manifest: Manifest, model: str | None, trust_remote_code: bool = False) -> Model:
    """The base model with the adapter, as section `model` of a recipe.

    Args:
        model: replaces the path in the manifest, for example on another machine.

    Raises:
        UserError: the base is missing, or differs from that of the training.
    """
    if location.merged and model is not None:
        raise UserError(f"--model: {location.folder} is a merged model, which needs no base; leave it out")
    here = location.merged or manifest.base.path == HERE
    path = str(location.folder) if here else model or manifest.base.path
    if not here and not path.startswith("pip:") and not Path(path).exists() and not is_hub_name(path):
        option = "--model" if model is not None else "the base model of the adapter"
        raise UserError(f"{option}: {path!r} is not there; name its folder or hub name with --model")
    base = Model(
        **manifest.base.model_dump(include={"dtype", "attn_implementation", "load_in_4bit"}),
        path=path,
        trust_remote_code=trust_remote_code,
        adapter=None if location.merged else str(location.folder),
    )
    manifest.check_base(base, location.folder)
    return base


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _recipe_in(run: Path) -> Path | None:
    return run / "recipe.yaml" if (run / "recipe.yaml").is_file() else None
