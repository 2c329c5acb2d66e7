"""From a recipe to the arguments of OpenRLHF's `train_ppo_ray`: one mapping, complete on both sides.

Every recipe key is in `PASSED_ON`, `COMPUTED` or `HANDLED_HERE`, and every option of OpenRLHF's parser in `options` or
in options.yaml, at its default; tests compare both with the recipe's schema and with the parser. So the namespace that
OpenRLHF's classes read is the one that its parser would return for `command`.
"""

from __future__ import annotations

import importlib.metadata
import math
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

import extensions.distributed.openrlhf  # noqa: F401 # makes openrlhf importable without flash-attn
from extensions.common.errors import UserError
from extensions.model.loading import model_folder
from extensions.ray_backend.cluster import ClusterShape
from extensions.recipe import Recipe, all_keys, value_at
from extensions.training.losses import is_options

from openrlhf.utils.config import hierarchize  # isort: skip

OPENRLHF = "0.11.2"  # the version that this package and options.yaml are written against
AGENT = Path(__file__).with_name("agent.py")

# Recipe key -> the option that gets its value.
PASSED_ON = {
    "seed": "train.seed",
    "lora.rank": "ds.lora.rank",
    "lora.alpha": "ds.lora.alpha",
    "lora.dropout": "ds.lora.dropout",
    "rollout.temperature": "rollout.temperature",
    "ppo.batch_size": "rollout.batch_size",
    "ppo.epochs": "train.max_epochs",
    "ppo.samples_per_prompt": "rollout.n_samples_per_prompt",
    "ppo.advantage_estimator": "algo.advantage.estimator",
    "ppo.gamma": "algo.advantage.gamma",
    "ppo.lam": "algo.advantage.lambd",
    "ppo.entropy_coef": "actor.entropy_coef",
    "ppo.kl.init": "algo.kl.init_coef",
    "ppo.kl.use_loss": "algo.kl.use_loss",
    "ppo.kl.estimator": "algo.kl.estimator",
    "optimizer.lr": "actor.adam.lr",
    "optimizer.weight_decay": "actor.adam.weight_decay",
    "optimizer.betas": "actor.adam.betas",
    "optimizer.eps": "actor.adam.eps",
    "schedule.warmup_ratio": "actor.lr_warmup_ratio",
    "schedule.min_lr_ratio": "actor.min_lr_ratio",
    "deepspeed.zero_stage": "ds.zero_stage",
    "deepspeed.offload": "ds.adam_offload",
    "vllm.tensor_parallel_size": "vllm.tensor_parallel_size",
    "vllm.gpu_memory_utilization": "vllm.gpu_memory_utilization",
    "ray.colocate": "train.colocate_all",
}
# Recipe key -> the option that gets a value computed from it, by `options`.
COMPUTED = {
    "output_dir": "ckpt.output_dir",
    "model.path": "actor.model_name_or_path",
    "rollout.response_budget": "rollout.max_new_tokens",  # its high end; the agent draws the budget of each row
    "ppo.clip": "actor.eps_clip_low_high",
    "ppo.mini_batch_size": "train.batch_size",
    "ppo.micro_batch_size": "train.micro_batch_size",
    "ppo.kl.target": "algo.kl.target",
    "ppo.kl.horizon": "algo.kl.horizon",
    "vllm.enforce_eager": "vllm.enforce_eager",
    "vllm.sleep": "vllm.enable_sleep",
    "vllm.is_correction": "algo.advantage.is_correction_mode",
    "vllm.is_threshold": "algo.advantage.is_correction_threshold",
    "ray.num_nodes": "actor.num_nodes",
    "ray.gpus_per_node": "actor.num_gpus_per_node",
    "ray.num_engines": "vllm.num_engines",
}
# Where other recipe keys, and whole sections, take effect. OpenRLHF has no option for most of them: no float32, no
# Adafactor, no rank-stabilised LoRA; and it loads every model with trust_remote_code.
HANDLED_HERE = {
    "handled by the run, as on the DeepSpeed backend": (
        "name", "method", "backend", "max_steps", "max_epochs", "evaluation", "logging", "checkpoint", "fork",
        "deepspeed.timeout",
    ),
    "handled by this project's classes, as on the DeepSpeed backend": (
        "data", "prompt", "reward", "parser", "model.dtype", "model.attn_implementation",
        "model.gradient_checkpointing",
        "model.trust_remote_code", "model.adapter", "lora.rslora", "lora.target_modules", "ppo.whiten",
        "ppo.whiten_min_std", "ppo.value_coef", "ppo.value_clip", "ppo.value_target", "ppo.kl.adaptive",
        "ppo.kl.reference", "optimizer.name", "optimizer.value_lr", "schedule.name", "schedule.epochs",
        "deepspeed.config", "vllm.probe_samples", "vllm.probe_tolerance", "ray.address", "ppo.critic_from",
    ),
    "differs": ("ppo.critic", "ppo.old_logprobs", "ppo.max_grad_norm"),
    "not used: the micro-batches of OpenRLHF's trainer have rows only": ("model.micro_batch_tokens",),
    "must be false": ("model.load_in_4bit", "ppo.drop_equal_groups"),
    "must be 0": ("ppo.resample_equal_groups",),
    "always vllm": ("rollout.backend",),
    "of another method": ("sft", "encoder"),
}  # fmt: skip


def key_table(recipe: Recipe) -> dict[str, tuple[Any, str]]:
    """Each key of the recipe with its value and where it takes effect."""
    places = {key: f"--{option}" for key, option in (PASSED_ON | COMPUTED).items()}
    places |= {key: place for place, keys in HANDLED_HERE.items() for key in keys}
    return {key: (value_at(recipe, key), places.get(key) or places[key.partition(".")[0]]) for key in all_keys()}


def micro_batch_size(recipe: Recipe, shape: ClusterShape) -> int:
    """Samples per forward on a rank: at most ppo.micro_batch_size, and a divisor, since OpenRLHF drops a remainder."""
    ppo = recipe.ppo
    share = (ppo.mini_batch_size or ppo.batch_size) * ppo.samples_per_prompt // shape.ranks
    most = ppo.micro_batch_size * ppo.samples_per_prompt
    return max(n for n in range(1, share + 1) if share % n == 0 and n <= most)


def options(recipe: Recipe, shape: ClusterShape) -> dict[str, Any]:
    """OpenRLHF's options for a recipe, without those of options.yaml."""
    ppo, model = recipe.ppo, str(model_folder(recipe.model))
    micro = micro_batch_size(recipe, shape)
    groups = {
        f"{group}.{option}": value
        for group in ("actor", "critic", "ref")
        for option, value in (("num_nodes", shape.nodes), ("num_gpus_per_node", shape.gpus_per_node))
    }
    correction = {f"algo.advantage.{name}": value for name, value in is_options(recipe.vllm).items()}
    passed_on = {option: value_at(recipe, key) for key, option in PASSED_ON.items()}
    return passed_on | groups | correction | {
        "actor.model_name_or_path": model,
        "critic.model_name_or_path": model,
        "train.agent_func_path": str(AGENT),
        "data.prompt_dataset": str(recipe.run_dir / "prompts"),  # never read
        "ckpt.output_dir": str(recipe.run_dir),
        "train.colocate_actor_ref": recipe.ray.colocate,
        "vllm.num_engines": shape.engines,
        "vllm.enforce_eager": recipe.vllm.enforce_eager or shape.on_cpu,
        "vllm.enable_sleep": recipe.vllm.sleep and recipe.ray.colocate and not shape.on_cpu,
        "vllm.enable_prefix_caching": True,
        "vllm.sync_backend": "gloo",  # unused; with nccl OpenRLHF changes the environment
        "rollout.micro_batch_size": micro,
        "rollout.vllm_generate_batch_size": ppo.batch_size,
        "rollout.max_new_tokens": recipe.rollout.max_new_tokens,
        "rollout.top_p": 1.0,
        "train.batch_size": (ppo.mini_batch_size or ppo.batch_size) * ppo.samples_per_prompt,
        "train.micro_batch_size": micro,
        "actor.eps_clip_low_high": list(ppo.clip_range),
        "algo.kl.unbiased_gradient": ppo.kl.use_loss and ppo.kl.estimator == "k1",
        "algo.kl.target": ppo.kl.target if ppo.kl.adaptive else None,
        "algo.kl.horizon": math.ceil(ppo.kl.horizon),
        "reward.clip_range": [-1e9, 1e9],  # rewards keep the values of the recipe's function
    }  # fmt: skip


def namespace(recipe: Recipe, shape: ClusterShape) -> SimpleNamespace:
    """The arguments that OpenRLHF's parser and the checks after it return for `command`, as its classes read them.

    Raises:
        UserError: another version of OpenRLHF is installed.
    """
    installed = importlib.metadata.version("openrlhf")
    if installed != OPENRLHF:
        raise UserError(f"backend: ray needs openrlhf {OPENRLHF}, and {installed} is installed; install {OPENRLHF}")
    defaults = yaml.safe_load(Path(__file__).with_name("options.yaml").read_text(encoding="utf-8"))
    flat = {name: value for group in defaults for name, value in group["options"].items()} | options(recipe, shape)
    flat |= {"reward.remote_url": ["agent"]}
    return hierarchize(SimpleNamespace(**flat))


def command(recipe: Recipe, shape: ClusterShape) -> str:
    """OpenRLHF's own command, for reading: without this project's classes it would not sync its adapters."""
    lines = ["python -m openrlhf.cli.train_ppo_ray"]
    for option, value in options(recipe, shape).items():
        if value is True:
            lines.append(f"--{option}")
        elif value is not None and value is not False:
            lines.append(shlex.join([f"--{option}", *map(str, value if isinstance(value, list) else [value])]))
    return " \\\n    ".join(lines)


def unsupported(recipe: Recipe) -> list[str]:
    """Settings of a recipe that this backend cannot run."""
    errors = []
    if recipe.model.load_in_4bit:
        errors.append("model.load_in_4bit: true: adapters over a 4-bit base are not synced to vLLM; use a dtype")
    if recipe.ppo.drop_equal_groups or recipe.ppo.resample_equal_groups:
        errors.append(
            "ppo.drop_equal_groups and ppo.resample_equal_groups: OpenRLHF's trainer updates on every sample; remove "
            "them"
        )
    if not float(recipe.ppo.kl.horizon).is_integer():
        errors.append(f"ppo.kl.horizon: {recipe.ppo.kl.horizon}: OpenRLHF needs a whole number of samples")
    return [f"backend: ray: {error}" for error in errors]


def differences(recipe: Recipe) -> list[str]:
    """Differences from the DeepSpeed backend for this recipe; each is printed at the start of a run."""
    ppo = recipe.ppo
    critic = "critic, " if ppo.value_model != "none" else ""
    reference = "reference, " if ppo.kl.init > 0 else ""
    conditional = {
        "ppo.critic: shared: OpenRLHF's critic is a group with its own adapter (as ppo.critic: adapter)": (
            ppo.value_model == "shared"
        ),
        "ppo.max_grad_norm: actor and critic are clipped by their own norms, not by their joint norm": (
            ppo.max_grad_norm > 0
        ),
        "ppo.old_logprobs: sampled: they are recomputed, since vLLM rounds otherwise": ppo.old_logprobs == "sampled",
        "lora.dropout: its masks follow OpenRLHF's order of the samples": recipe.lora.dropout > 0,
        "deepspeed.zero_stage: 3 shards each group's base over the group's ranks": recipe.deepspeed.zero_stage == 3,
    }
    return [
        f"each group holds a copy of the base: actor, {critic}{reference}and each vLLM engine one more",
        "sampling draws other random numbers: those of vLLM, with one seed per sample",
        "deepspeed.timeout: of a whole rollout, reference or update, since the groups report no progress inside one",
        *(text for text, applies in conditional.items() if applies),
    ]
