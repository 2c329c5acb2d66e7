"""The critic that a PPO run left in `critic/`: where a later run finds it, and how it is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from extensions.common.errors import UserError
from extensions.model.policy import Policy
from extensions.recipe import Recipe

HEAD = "value_head.safetensors"
ADAPTER, CONFIG = "critic/adapter_model.safetensors", "critic/adapter_config.json"  # with ppo.critic: adapter
FILES = (HEAD, ADAPTER, CONFIG)


def critic_source(recipe: Recipe, warn: Callable[[str], None] = lambda text: None) -> Path | None:
    """The folder that the critic of a PPO run starts from by `ppo.critic_from`; None: a new one.

    Args:
        warn: gets the reason where a critic beside `model.adapter` is not used.

    Raises:
        UserError: the folder that the key names has no critic, or one of another kind; or a file is damaged.
    """
    named, adapter = recipe.ppo.critic_from, recipe.model.adapter
    wanted = recipe.ppo.value_model if recipe.method == "ppo" else "none"
    if wanted == "none" or named == "none" or (named == "auto" and adapter is None):
        return None
    folder = Path(str(adapter)).parent / "critic" if named == "auto" else Path(named)
    if named == "auto" and not folder.is_dir():
        return None  # an adapter of SFT, or one that has been copied
    if not (folder / HEAD).is_file():
        raise UserError(f"ppo.critic_from: {folder} has no {HEAD}; name the critic/ of a PPO run, or set it to none")
    found = "adapter" if any((folder / name).exists() for name in (ADAPTER, CONFIG)) else "shared"
    for name in (HEAD, ADAPTER) if found == "adapter" else (HEAD,):
        _read(folder / name)
    kind = "adapter" if recipe.backend == "ray" else wanted
    if found == kind:
        return folder
    if named == "auto":
        warn(f"the value head starts at zero: {folder} is of ppo.critic: {found}, this run has {kind}")
        return None
    raise UserError(
        f"ppo.critic_from: {folder} is of ppo.critic: {found}, this run has {kind}; set ppo.critic={found}, or "
        "ppo.critic_from=none"
    )


def critic_hash(recipe: Recipe) -> str | None:
    """sha256 of the files of the critic that a run starts from; None: a new one."""
    folder = critic_source(recipe)
    if folder is None:
        return None
    digest = hashlib.sha256()
    for name in FILES:
        digest.update((folder / name).read_bytes() if (folder / name).is_file() else b"")
    return digest.hexdigest()


def load_critic(policy: Policy, folder: Path) -> None:
    """Set the value head, and the critic's adapter if there is one, to those in `folder`.

    Raises:
        UserError: a file is damaged, or does not match the policy.
    """
    assert policy.value_head is not None
    _copy(folder / HEAD, policy.value_head.state_dict())
    if policy.has_critic_adapter:
        config, own = folder / CONFIG, policy.lm.peft_config["critic"]
        try:
            saved = json.loads(config.read_text(encoding="utf-8"))
            found = (float(saved["lora_alpha"]), bool(saved.get("use_rslora")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _unusable(config, f"it cannot be read ({error})") from error
        if found != (own.lora_alpha, own.use_rslora):
            raise _unusable(config, f"lora.alpha={found[0]:g} lora.rslora={found[1]} are not those of this run")
        _copy(
            folder / ADAPTER, get_peft_model_state_dict(policy.lm, adapter_name="critic", save_embedding_layers=False)
        )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unusable(path, f"it cannot be read ({error})") from error


def _copy(path: Path, wanted: Mapping[str, Tensor]) -> None:
    """Copy the tensors in a file into those of a state dict, which share their memory with the model."""
    found = _read(path)
    if found.keys() != wanted.keys():
        names = sorted(found.keys() ^ wanted.keys())
        raise _unusable(path, f"its weights are not those of this run's critic ({'; '.join(names[:2])})")
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            shapes = f"{list(found[name].shape)}, expected {list(tensor.shape)}"
            raise _unusable(path, f"{name} is {shapes}: it is of another model or lora.rank")
        if not torch.isfinite(found[name]).all():
            raise _unusable(path, f"{name} has non-finite values")
        tensor.copy_(found[name])


def _unusable(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path}: cannot start the critic from it: {reason}. ppo.critic_from=none starts with a new value head"
    )
