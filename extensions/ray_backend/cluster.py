"""The Ray cluster of a run: one that is there, or one that is started on this machine."""

from __future__ import annotations

import os
from typing import Any

import torch

from extensions.common.errors import UserError
from extensions.ray_backend.arguments import ClusterShape
from extensions.recipe import Recipe

PASSED_ON = ("TORCH_EXTENSIONS_DIR", "DS_ACCELERATOR", "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE", "XDG_CACHE_HOME")
PREFIXES = ("VLLM_", "NCCL_", "GLOO_")


def join(recipe: Recipe) -> int:
    """Join the cluster of ray.address or RAY_ADDRESS, if one is named. Returns the GPUs of a node; 0 on CPUs.

    Raises:
        UserError: none answers there.
    """
    import ray

    address = recipe.ray.address or os.environ.get("RAY_ADDRESS")
    if not address:
        return torch.cuda.device_count()
    try:
        ray.init(address=address, **_settings())
    except (ConnectionError, ValueError) as error:
        raise UserError(f"ray.address: {address}: no Ray cluster answers there ({error})") from error
    # A node started with --num-gpus on a machine without any has no accelerator's name.
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    real = [own for own in nodes if any(name.startswith("accelerator_type:") for name in own)]
    return max((int(own.get("GPU", 0)) for own in real), default=0)


def ensure(recipe: Recipe, shape: ClusterShape) -> None:
    """Start a cluster on this machine if none was joined, and see that it is large enough.

    Raises:
        UserError: it has too few GPUs.
    """
    import ray

    parallel = recipe.vllm.tensor_parallel_size
    groups = 2 + (recipe.ppo.kl.init > 0)
    wanted = shape.ranks if recipe.ray.colocate else shape.ranks * groups + shape.engines * parallel
    if not ray.is_initialized():
        # On a CPU a "GPU" is a place for a rank.
        count = wanted if shape.on_cpu else torch.cuda.device_count()
        cpus = max(count + 1, os.cpu_count() or 1)
        # "local": without it Ray joins a cluster that somebody left running here, or only its file.
        ray.init("local", num_gpus=count, num_cpus=cpus, include_dashboard=False, **_settings())
    there = int(ray.cluster_resources().get("GPU", 0))
    if there < wanted:
        ray.shutdown()
        raise UserError(
            f"the Ray cluster has {there} GPUs and this recipe needs {wanted}; change ray.num_nodes, "
            "ray.gpus_per_node, ray.num_engines or ray.colocate (on machines without GPUs start nodes with ray start "
            "--num-gpus=N)"
        )


def _settings() -> dict[str, Any]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    passed = {name: value for name, value in os.environ.items() if name in PASSED_ON or name.startswith(PREFIXES)}
    return {
        "runtime_env": {"env_vars": passed},
        "log_to_driver": os.environ.get("NLU_RAY_LOGS") == "1",
        "logging_level": "warning",
    }
