"""Where a trained model is: a run folder, an adapter's folder, or a merged model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from extensions.common.errors import UserError
from extensions.inference import handover
from extensions.inference.handover import HandOver
from extensions.model.hub import is_hub_name
from extensions.recipe import Model


@dataclass(frozen=True)
class Location:
    """A trained model on the disk."""

    folder: Path  # with nlu.json and the tokenizer
    merged: bool  # a whole model, not an adapter
    recipe: Path | None  # of its run, where that stands beside it
    note: str | None  # what was found instead of what was named


def locate(path: str | Path) -> Location:
    """The model that a user names.

    Raises:
        UserError: there is none.
    """
    named = Path(path)
    sft = named.with_name(f"{named.name}-sft")
    if not named.exists() and _is_adapter(sft / "adapter"):
        note = f"{named} is not there; answering with {sft}, the supervised run of the same name"
        return Location(sft / "adapter", False, _beside(sft), note)
    if _is_adapter(named / "adapter"):
        return Location(named / "adapter", False, _beside(named), None)
    if _is_adapter(named):
        return Location(named, False, _beside(named.resolve().parent), None)
    if (named / "config.json").is_file():
        return Location(named, True, None, None)
    if not named.exists():
        raise UserError(f"{named}: no such folder; name a run (runs/NAME), an adapter or a merged model")
    more = f"; {sft} has one" if _is_adapter(sft / "adapter") else ""
    if (named / "recipe.yaml").is_file():
        raise UserError(
            f"{named}: this run has no adapter: it is unfinished, or trained none (evaluation, encoder){more}"
        )
    raise UserError(f"{named}: neither a run folder, nor an adapter, nor a merged model{more}")


def base_of(location: Location, handed: HandOver, model: str | None, trust_remote_code: bool = False) -> Model:
    """The base model with the adapter, as section `model` of a recipe.

    Args:
        model: in place of the path in the hand-over file, for another machine.

    Raises:
        UserError: the base is not there, or it is another one.
    """
    if location.merged and model is not None:
        raise UserError(f"--model: {location.folder} is a merged model, which needs no base; leave it out")
    here = location.merged or handed.base.path == handover.HERE
    path = str(location.folder) if here else model or handed.base.path
    if not here and not path.startswith("pip:") and not Path(path).exists() and not is_hub_name(path):
        option = "--model" if model is not None else "the base model of the adapter"
        raise UserError(f"{option}: {path!r} is not there; name its folder or hub name with --model")
    base = Model(
        path=path,
        dtype=handed.base.dtype,
        attn_implementation=handed.base.attn_implementation,
        load_in_4bit=handed.base.load_in_4bit,
        trust_remote_code=trust_remote_code,
        adapter=None if location.merged else str(location.folder),
    )
    handover.check_base(handed, base, location.folder)
    return base


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _beside(run: Path) -> Path | None:
    return run / "recipe.yaml" if (run / "recipe.yaml").is_file() else None
