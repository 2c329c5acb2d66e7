"""The Ray cluster of a run: its shape, and a connection to a running cluster or a new one on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from extensions.common.errors import UserError
from extensions.recipe import Recipe

# Environment variables that the cluster's processes receive.
FORWARDED = ("TORCH_EXTENSIONS_DIR", "DS_ACCELERATOR", "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE", "XDG_CACHE_HOME")
FORWARDED_PREFIXES = ("VLLM_", "NCCL_", "GLOO_")


@dataclass(frozen=True)
class ClusterShape:
    """The nodes, ranks and vLLM engines of a run."""

    nodes: int  # per group
    gpus_per_node: int  # ranks of each group per node
    engines: int
    on_cpu: bool

    @property
    def ranks(self) -> int:
        """Per group."""
        return self.nodes * self.gpus_per_node


def shape_of(recipe: Recipe, gpus_here: int) -> ClusterShape:
    """The shape of a recipe's cluster.

    Args:
        gpus_here: GPUs of this machine, or of a node of the cluster; 0 on CPUs.

    Raises:
        UserError: the engines do not fit the GPUs that they share, or the batch does not fit the ranks.
    """
    ray, ppo, parallel = recipe.ray, recipe.ppo, recipe.vllm.tensor_parallel_size
    per_node = ray.gpus_per_node or max(1, gpus_here)
    ranks = ray.num_nodes * per_node
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


def join(recipe: Recipe) -> int:
    """Connect to the cluster at ray.address or RAY_ADDRESS, if one is given. Returns GPUs per node; 0 on CPUs.

    Raises:
        UserError: no cluster answers there.
    """
    import ray

    address = recipe.ray.address or os.environ.get("RAY_ADDRESS")
    if not address:
        return torch.cuda.device_count()
    try:
        ray.init(address=address, **_settings())
    except (ConnectionError, ValueError) as error:
        raise UserError(f"ray.address: {address}: cannot join a Ray cluster there ({error})") from error
    # A node started with --num-gpus on a machine without GPUs has no accelerator type.
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    real = [node for node in nodes if any(name.startswith("accelerator_type:") for name in node)]
    return max((int(node.get("GPU", 0)) for node in real), default=0)


def ensure(recipe: Recipe, shape: ClusterShape) -> None:
    """Start a cluster on this machine unless one was joined, and check that it has enough GPUs.

    Raises:
        UserError: it has too few.
    """
    import ray

    groups = 2 + (recipe.ppo.kl.init > 0)
    needed = shape.ranks
    if not recipe.ray.colocate:
        needed = shape.ranks * groups + shape.engines * recipe.vllm.tensor_parallel_size
    if not ray.is_initialized():
        num_gpus = needed if shape.on_cpu else torch.cuda.device_count()  # on a CPU each "GPU" is a slot for a rank
        num_cpus = max(num_gpus + 1, os.cpu_count() or 1)
        # Without "local" Ray would join any cluster that still runs on this machine, or the address file of a dead one.
        ray.init("local", num_gpus=num_gpus, num_cpus=num_cpus, include_dashboard=False, **_settings())
    found = int(ray.cluster_resources().get("GPU", 0))
    if found < needed:
        ray.shutdown()
        raise UserError(
            f"the Ray cluster has {found} GPUs and this recipe needs {needed}; change ray.num_nodes, "
            "ray.gpus_per_node, ray.num_engines or ray.colocate (on machines without GPUs start nodes with ray start "
            "--num-gpus=N)"
        )


def _settings() -> dict[str, Any]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    forwarded = {
        name: value for name, value in os.environ.items() if name in FORWARDED or name.startswith(FORWARDED_PREFIXES)
    }
    return {
        "runtime_env": {"env_vars": forwarded},
        "log_to_driver": os.environ.get("NLU_RAY_LOGS") == "1",
        "logging_level": "warning",
    }
