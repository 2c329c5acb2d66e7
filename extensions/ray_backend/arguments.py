"""From a recipe to the arguments of OpenRLHF's `train_ppo_ray`: one mapping, total on both sides.

Every key of a recipe is in `KEYS`, every option of OpenRLHF's parser in `given` or in `LEFT`; tests compare both with
the recipe's schema and with the parser itself. A key goes to an option; or it is kept by this project's part of the
engine and means the same as in the DeepSpeed loop; or it differs, and the difference is printed; or it is refused.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extensions.common.errors import UserError
from extensions.model.loading import model_folder
from extensions.recipe import Recipe, all_keys, value_at

AGENT = Path(__file__).with_name("agent.py")
OURS = "kept by this project's part of the engine"
RUN = "of the run around the training, which is the DeepSpeed loop's"
OTHER = "of another method than PPO"

# Where each key of a recipe goes: an option, or who keeps it.
KEYS: dict[str, str] = {
    "name": RUN,
    "method": RUN,
    "seed": "--train.seed",
    "backend": RUN,
    "output_dir": "--ckpt.output_dir",
    "max_steps": RUN,
    "max_epochs": RUN,
    "model.path": "--actor.model_name_or_path",
    "model.dtype": OURS,  # --ds.param_dtype knows no float32
    "model.attn_implementation": OURS,
    "model.gradient_checkpointing": OURS,
    "model.load_in_4bit": "refused",
    "model.trust_remote_code": OURS,  # OpenRLHF sets it for whatever it loads by a name
    "model.adapter": OURS,
    "lora.rank": "--ds.lora.rank",
    "lora.alpha": "--ds.lora.alpha",
    "lora.dropout": "--ds.lora.dropout",
    "lora.rslora": OURS,
    "lora.target_modules": OURS,  # auto and all-linear are resolved where the model is known
    "data.tasks": OURS,
    "data.root": OURS,
    "data.max_train_samples": OURS,
    "data.oversample": OURS,
    "data.class_weights": OURS,
    "data.balanced": OURS,
    "data.mixing": OURS,
    "data.mixing_cap": OURS,
    "data.mixing_temperature": OURS,
    "prompt.chat_template": OURS,
    "prompt.max_tokens": OURS,
    "prompt.shots": OURS,
    "prompt.demonstrations": OURS,
    "prompt.template_options": OURS,
    "rollout.backend": "vLLM in any case",
    "rollout.response_budget": "--rollout.max_new_tokens",  # its high end; the agent draws the budget of each row
    "rollout.temperature": "--rollout.temperature",
    "reward": OURS,
    "ppo.batch_size": "--rollout.batch_size",
    "ppo.epochs": "--train.max_epochs",
    "ppo.mini_batch_size": "--train.batch_size",
    "ppo.micro_batch_size": "--train.micro_batch_size",
    "ppo.clip": "--actor.eps_clip",
    "ppo.gamma": "--algo.advantage.gamma",
    "ppo.lam": "--algo.advantage.lambd",
    "ppo.whiten": OURS,
    "ppo.whiten_min_std": OURS,
    "ppo.entropy_coef": "--actor.entropy_coef",
    "ppo.value_coef": OURS,
    "ppo.value_clip": OURS,
    "ppo.value_target": OURS,
    "ppo.critic": "differs",
    "ppo.old_logprobs": "differs",
    "ppo.max_grad_norm": "differs",
    "ppo.kl.init": "--algo.kl.init_coef",
    "ppo.kl.adaptive": OURS,
    "ppo.kl.target": "--algo.kl.target",
    "ppo.kl.horizon": "--algo.kl.horizon",
    "ppo.kl.reference": OURS,
    "optimizer.name": OURS,  # OpenRLHF has no Adafactor
    "optimizer.lr": "--actor.adam.lr",
    "optimizer.value_lr": OURS,
    "optimizer.weight_decay": "--actor.adam.weight_decay",
    "optimizer.betas": "--actor.adam.betas",
    "optimizer.eps": "--actor.adam.eps",
    "schedule.name": OURS,
    "schedule.warmup_ratio": "--actor.lr_warmup_ratio",
    "schedule.min_lr_ratio": "--actor.min_lr_ratio",
    "deepspeed.zero_stage": "--ds.zero_stage",
    "deepspeed.offload": "--ds.adam_offload",
    "deepspeed.config": OURS,
    "deepspeed.timeout": RUN,
    "vllm.tensor_parallel_size": "--vllm.tensor_parallel_size",
    "vllm.gpu_memory_utilization": "--vllm.gpu_memory_utilization",
    "vllm.enforce_eager": "--vllm.enforce_eager",
    "vllm.sleep": "--vllm.enable_sleep",
    "vllm.probe_samples": OURS,
    "vllm.probe_tolerance": OURS,
    "ray.address": OURS,
    "ray.num_nodes": "--actor.num_nodes",
    "ray.gpus_per_node": "--actor.num_gpus_per_node",
    "ray.colocate": "--train.colocate_all",
    "ray.num_engines": "--vllm.num_engines",
}
SECTIONS = {"sft": OTHER, "encoder": OTHER, "evaluation": RUN, "logging": RUN, "checkpoint": RUN}  # whole ones

# Options that stay as they are, by their beginning, and why.
LEFT: dict[str, str] = {
    "--reward.num_": "rewards are a rule, not a model",
    "--reward.model_name_or_path": "rewards are a rule, not a model",
    "--reward.remote_url": "rewards are the agent's",
    "--reward.normalize_enable": "rewards are a rule, not a model",
    "--reward.offload": "rewards are a rule, not a model",
    "--reward.overlong_": "not in the paper",
    "--reward.stop_properly_": "not in the paper",
    "--train.colocate_critic_reward": "there is no reward model",
    "--vllm.sync_with_ray": "weights do not travel that way",
    "--algo.advantage.is_correction_": "logprobs are recomputed by the trainer before the first epoch",
    "--algo.advantage.estimator": "gae, the default",
    "--algo.advantage.no_std_norm": "whitening is ours",
    "--algo.kl.use_loss": "the penalty is in the reward",
    "--algo.kl.estimator": "k1, the default: log pi_old - log pi_ref",
    "--algo.kl.unbiased_gradient": "the penalty is in the reward",
    "--algo.dynamic_filtering_": "not in the paper",
    "--train.async_": "every batch is of the current policy",
    "--train.partial_rollout_enable": "every batch is of the current policy",
    "--train.enable_ema": "not in the paper",
    "--train.ema_beta": "not in the paper",
    "--train.dynamic_batch_enable": "rows share their prefix in packs of our own",
    "--train.max_tokens_per_gpu": "of dynamic batches",
    "--rollout.max_tokens_per_gpu": "of dynamic batches",
    "--train.full_determinism_enable": "only of OpenRLHF's own set-up",
    "--train.num_episodes": "the order of the batches is ours",
    "--eval.": "evaluation is ours",
    "--ckpt.": "checkpoints are ours",
    "--logger.": "records are ours",
    "--ds.use_universal_ckpt": "checkpoints are ours",
    "--local_rank": "Ray starts the ranks",
    "--ds.deepcompile": "not used",
    "--ds.zpg": "not used",
    "--ds.experts_implementation": "models are loaded by ours",
    "--ds.attn_implementation": "models are loaded by ours",
    "--ds.param_dtype": "models are loaded by ours, in the recipe's dtype",
    "--ds.use_liger_kernel": "models are loaded by ours",
    "--ds.grad_accum_dtype": "trained parameters are float32",
    "--ds.overlap_comm": "LoRA gradients are small",
    "--ds.enable_sleep": "LoRA's optimizer state is small",
    "--ds.tensor_parallel_size": "of the trainer; models that need it are sharded by ZeRO 3",
    "--ds.packing_samples": "rows share their prefix in packs of our own",
    "--ds.load_in_4bit": "refused",
    "--ds.lora.target_modules": "adapters are made by ours",
    "--ds.ring_attn_": "prompts are short",
    "--ds.value_head_prefix": "the value head is the paper's MLP, made by ours",
    "--actor.gradient_checkpointing_": "models are loaded by ours",
    "--actor.dual_clip": "not in the paper",
    "--actor.eps_clip_low_high": "one clip range, as in the paper",
    "--actor.policy_loss_type": "ppo, the default",
    "--actor.loss_agg_mode": "token-mean, the default, as in the DeepSpeed loop",
    "--actor.aux_loss_coef": "of mixtures of experts",
    "--actor.optim": "optimizer and schedule are made by ours",
    "--actor.muon.": "optimizer and schedule are made by ours",
    "--actor.lr_scheduler": "optimizer and schedule are made by ours",
    "--actor.max_norm": "optimizer and schedule are made by ours",
    "--critic.optim": "optimizer and schedule are made by ours",
    "--critic.muon.": "optimizer and schedule are made by ours",
    "--critic.adam.": "optimizer and schedule are made by ours, the same for actor and critic",
    "--critic.lr_": "optimizer and schedule are made by ours",
    "--critic.min_lr_ratio": "optimizer and schedule are made by ours",
    "--critic.max_norm": "optimizer and schedule are made by ours",
    "--critic.value_clip": "the value loss is ours",
    "--critic.freezing_steps": "not in the paper",
    "--critic.save_value_network": "saved by ours",
    "--actor.freeze_visual_encoder": "text alone",
    "--data.": "rows and prompts are ours",
    "--use_ms": "models are loaded by ours",
    "--ref.offload": "not used",
}


@dataclass(frozen=True)
class ClusterShape:
    """How many of what."""

    nodes: int  # of each group
    gpus_per_node: int  # ranks of each group on a node
    engines: int
    on_cpu: bool

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


def shape_of(recipe: Recipe, gpus_here: int) -> ClusterShape:
    """
    Args:
        gpus_here: GPUs of this machine; 0 on a CPU.

    Raises:
        UserError: the engines do not fit the GPUs that they share, or the batch not the ranks.
    """
    ray, ppo = recipe.ray, recipe.ppo
    per_node = ray.gpus_per_node or max(1, gpus_here)
    ranks, parallel = ray.num_nodes * per_node, recipe.vllm.tensor_parallel_size
    engines = ray.num_engines or max(1, ranks // parallel)
    if ray.colocate and engines * parallel != ranks:
        raise UserError(
            f"ray.colocate: true: {engines} engines of {parallel} GPUs do not fill the {ranks} GPUs of the actor; set "
            "ray.num_engines: null and a vllm.tensor_parallel_size that divides them, or ray.colocate: false"
        )
    for key, size in (("ppo.batch_size", ppo.batch_size), ("ppo.mini_batch_size", ppo.mini_batch_size)):
        if size is not None and size % ranks:
            raise UserError(
                f"{key}: {size} samples cannot be shared evenly by {ranks} ranks (ray.num_nodes x ray.gpus_per_node); "
                f"use a multiple of {ranks}"
            )
    return ClusterShape(ray.num_nodes, per_node, engines, gpus_here == 0)


def micro_batch(recipe: Recipe, shape: ClusterShape) -> int:
    """Rows of a forward on a rank: at most ppo.micro_batch_size, and a divisor, since OpenRLHF drops a rest."""
    share = (recipe.ppo.mini_batch_size or recipe.ppo.batch_size) // shape.ranks
    return max(n for n in range(1, share + 1) if share % n == 0 and n <= recipe.ppo.micro_batch_size)


def given(recipe: Recipe, shape: ClusterShape) -> dict[str, Any]:
    """OpenRLHF's options for a recipe; True is a flag, None leaves the default."""
    ppo, kl, optimizer = recipe.ppo, recipe.ppo.kl, recipe.optimizer
    model = str(model_folder(recipe.model))
    groups = {
        f"--{group}.{key}": value
        for group in ("actor", "critic", "ref")
        for key, value in (("num_nodes", shape.nodes), ("num_gpus_per_node", shape.gpus_per_node))
    }
    micro = micro_batch(recipe, shape)
    return groups | {
        "--actor.model_name_or_path": model,
        "--critic.model_name_or_path": model,
        "--train.agent_func_path": str(AGENT),
        "--data.prompt_dataset": str(recipe.run_dir / "prompts"),  # never read
        "--ckpt.output_dir": str(recipe.run_dir),
        "--train.seed": recipe.seed,
        "--train.colocate_all": recipe.ray.colocate or None,
        "--train.colocate_actor_ref": recipe.ray.colocate or None,
        "--vllm.num_engines": shape.engines,
        "--vllm.tensor_parallel_size": recipe.vllm.tensor_parallel_size,
        "--vllm.gpu_memory_utilization": recipe.vllm.gpu_memory_utilization,
        "--vllm.enforce_eager": recipe.vllm.enforce_eager or shape.on_cpu or None,
        "--vllm.enable_sleep": (recipe.vllm.sleep and recipe.ray.colocate and not shape.on_cpu) or None,
        "--vllm.enable_prefix_caching": True,
        "--vllm.sync_backend": "gloo",  # no NCCL: weights do not travel that way
        "--ds.zero_stage": recipe.deepspeed.zero_stage,
        "--ds.adam_offload": recipe.deepspeed.offload or None,
        "--ds.lora.rank": recipe.lora.rank,
        "--ds.lora.alpha": recipe.lora.alpha,
        "--ds.lora.dropout": recipe.lora.dropout,
        "--rollout.batch_size": ppo.batch_size,
        "--rollout.micro_batch_size": micro,
        "--rollout.vllm_generate_batch_size": ppo.batch_size,
        "--rollout.n_samples_per_prompt": 1,
        "--rollout.max_new_tokens": recipe.rollout.max_new_tokens,
        "--rollout.temperature": recipe.rollout.temperature,
        "--rollout.top_p": 1.0,
        "--train.batch_size": ppo.mini_batch_size or ppo.batch_size,
        "--train.micro_batch_size": micro,
        "--train.max_epochs": ppo.epochs,
        "--actor.eps_clip": ppo.clip,
        "--actor.entropy_coef": ppo.entropy_coef,
        "--algo.advantage.gamma": ppo.gamma,
        "--algo.advantage.lambd": ppo.lam,
        "--algo.kl.init_coef": kl.init,
        "--algo.kl.target": kl.target if kl.adaptive else None,
        "--algo.kl.horizon": math.ceil(kl.horizon),
        "--reward.clip_range": [-1000000000.0, 1000000000.0],  # rewards are as the recipe's function gives them
        "--actor.adam.lr": optimizer.lr,
        "--actor.adam.betas": optimizer.betas,
        "--actor.adam.eps": optimizer.eps,
        "--actor.adam.weight_decay": optimizer.weight_decay,
        "--actor.lr_warmup_ratio": recipe.schedule.warmup_ratio,
        "--actor.min_lr_ratio": recipe.schedule.min_lr_ratio,
    }


def arguments(recipe: Recipe, shape: ClusterShape) -> list[str]:
    """The same as a command line has it."""
    return [word for words in _options(recipe, shape) for word in words]


def command(recipe: Recipe, shape: ClusterShape) -> str:
    """OpenRLHF's own command, to be read: without this project's parts it would not sync its adapters."""
    return " \\\n    ".join(["python -m openrlhf.cli.train_ppo_ray", *map(shlex.join, _options(recipe, shape))])


def _options(recipe: Recipe, shape: ClusterShape) -> Iterator[list[str]]:
    """Each option that is given, with its values, as words."""
    for option, value in given(recipe, shape).items():
        if value is True:
            yield [option]
        elif value is not None:
            yield [option, *map(str, value if isinstance(value, list) else [value])]


def refused(recipe: Recipe) -> list[str]:
    """What the engine cannot do of a recipe."""
    errors = []
    if recipe.model.load_in_4bit:
        errors.append("model.load_in_4bit: true: adapters over a 4-bit base are not synced to vLLM; use a dtype")
    if not float(recipe.ppo.kl.horizon).is_integer():
        errors.append(f"ppo.kl.horizon: {recipe.ppo.kl.horizon}: OpenRLHF's is a whole number of samples")
    return [f"backend: ray: {error}" for error in errors]


def differences(recipe: Recipe) -> list[str]:
    """What is otherwise than in the DeepSpeed loop, for this recipe; each is printed at the start of a run."""
    found = [
        "each group holds a copy of the base: actor, critic, "
        + ("reference, " if recipe.ppo.kl.init > 0 else "")
        + "and vLLM its own",
        "sampling draws other random numbers: vLLM's, by a seed a row",
        "deepspeed.timeout: of a whole rollout, reference or update, since no group tells how far it is",
    ]
    if recipe.ppo.critic == "shared":
        found.append(
            "ppo.critic: shared: OpenRLHF's critic is a group of its own, with its own adapter (as critic: adapter)"
        )
    if recipe.ppo.max_grad_norm:
        found.append("ppo.max_grad_norm: actor and critic are clipped each by its own norm, not by their common one")
    if recipe.ppo.old_logprobs == "sampled":
        found.append("ppo.old_logprobs: sampled: they are recomputed, since vLLM's are rounded otherwise")
    if recipe.lora.dropout:
        found.append("lora.dropout: its masks are drawn by OpenRLHF's order of the rows")
    if recipe.deepspeed.zero_stage == 3:
        found.append("deepspeed.zero_stage: 3 shards each group's base over its own ranks")
    return found


def where(recipe: Recipe) -> dict[str, tuple[Any, str]]:
    """Each key of the recipe with its value and where it goes."""
    found = {}
    for key in all_keys():
        section = key.partition(".")[0]
        found[key] = (value_at(recipe, key), KEYS[key] if key in KEYS else SECTIONS[section])
    return found
