"""OpenRLHF's DeepSpeed strategy, made device-agnostic (CPU with gloo, CUDA with NCCL), and the collectives of a run."""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from extensions.common.errors import UserError
from extensions.distributed import signals, watchdog
from extensions.distributed.nonfinite import NonFiniteCheck
from extensions.distributed.openrlhf import DeepspeedStrategy, deepspeed, load_op, remove_shared_memory
from extensions.distributed.optim import make_optimizer, make_scheduler
from extensions.distributed.rendezvous import rendezvous
from extensions.recipe import DeepSpeed, Optimizer, Schedule

# Keys that the recipe sets; they must not appear in a user's own DeepSpeed JSON.
OWNED_BY_RECIPE = (
    "optimizer",
    "scheduler",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)


class Strategy(DeepspeedStrategy):
    """DeepSpeed engine, ranks and collectives of a run. It works on modules and parameter groups, not on the policy.

    Args:
        seed: seed of torch's generators on every rank.
        settings: recipe section `deepspeed`.
        max_grad_norm: gradient clipping; 0: off.
    """

    def __init__(self, seed: int, settings: DeepSpeed, max_grad_norm: float) -> None:
        # "fp32": DeepSpeed's bf16 section would cast the float32 adapters; without it the base keeps its own dtype.
        # With dynamic batches, OpenRLHF leaves gradient accumulation to the caller, which marks the boundaries.
        args = SimpleNamespace(
            local_rank=-1,
            ds=SimpleNamespace(
                param_dtype="fp32",
                zero_stage=settings.zero_stage,
                tensor_parallel_size=1,
                adam_offload=settings.offload,
            ),
            train=SimpleNamespace(dynamic_batch_enable=True),
        )
        super().__init__(seed=seed, max_norm=max_grad_norm, zero_stage=settings.zero_stage, args=args)
        self.settings = settings
        self._grad_norm = 0.0
        self._stepping = False

    # ----------------------------------------------------------------------------------------------- processes

    def setup_distributed(self, timeout: timedelta = timedelta(minutes=30)) -> None:
        """Join the process group; without a launcher, create one with a single rank.

        Replaces OpenRLHF's method, whose `torch.cuda.set_device` and "cuda" mesh are its only CUDA-bound steps before
        training (0.11.2).
        """
        if "RANK" not in os.environ:
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        transformers.set_seed(self.seed)
        accelerator = deepspeed.accelerator.get_accelerator()
        if accelerator.device_name() == "cpu":
            load_op("ShareMemCommBuilder")
        else:
            accelerator.set_device(int(os.environ["LOCAL_RANK"]))
        if not dist.is_initialized():  # process-wide state of DeepSpeed: join once, leave at exit
            with rendezvous(timeout):
                deepspeed.init_distributed(accelerator.communication_backend_name(), timeout=timeout, verbose=False)
            atexit.register(dist.destroy_process_group)
            atexit.register(remove_shared_memory)
        self.world_size = dist.get_world_size()
        self.ds_device_mesh = init_device_mesh(
            accelerator.device_name(), (self.world_size, 1, 1), mesh_dim_names=("dp", "sp", "tp")
        )
        self.setup_ring_attn(self.ds_device_mesh)
        self.accumulated_gradient = 1

    @property
    def device(self) -> torch.device:
        return torch.device(deepspeed.accelerator.get_accelerator().current_device_name())

    @property
    def rank(self) -> int:
        return self.get_rank()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks; the same result on every rank."""
        if self.world_size == 1:
            return values
        on_device = values.to(self.device)
        with watchdog.waiting("a sum over the ranks"):
            dist.all_reduce(on_device)
            self._settle()
        return on_device.to(values.device)

    def gather(self, item: Any) -> list[Any]:
        """One picklable item per rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.world_size
        with watchdog.waiting("an exchange between the ranks"):
            dist.all_gather_object(items, item)
        return items

    def gather_to_rank_0(self, item: Any) -> list[Any] | None:
        """One picklable item per rank, in rank order, on rank 0; None on the others."""
        if self.world_size == 1:
            return [item]
        items: list[Any] | None = [None] * self.world_size if self.is_rank_0() else None
        with watchdog.waiting("an exchange between the ranks"):
            dist.gather_object(item, items)
        return items

    def barrier(self) -> None:
        if self.world_size > 1:
            with watchdog.waiting("a barrier"):
                dist.barrier()
                self._settle()

    def _settle(self) -> None:
        """Synchronise here: CUDA collectives return at once, and the wait would be attributed to later code."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def stopping(self) -> bool:
        """Whether any rank has a stop request (`extensions.distributed.signals`); the same result on every rank."""
        return bool(self.sum(torch.tensor(int(signals.requested() is not None))))

    # ------------------------------------------------------------------------------------------------ training

    def wrap(
        self,
        module: nn.Module,
        groups: Sequence[dict[str, Any]],
        optimizer: Optimizer,
        schedule: Schedule,
        num_updates: int,
    ) -> deepspeed.DeepSpeedEngine:
        """A DeepSpeed engine around a module.

        Args:
            groups: the module's trained parameters, as groups of a torch optimizer.
            num_updates: optimizer steps that the schedule spans.

        Raises:
            UserError: ZeRO 3 cannot shard the module.
        """
        convolution = next((name for name, m in module.named_modules() if isinstance(m, nn.Conv1d)), None)
        if self.stage == 3 and convolution is not None:
            # Lfm2, Mamba and similar models read the weight without calling the module, so DeepSpeed (0.19.6) does not
            # gather it.
            raise UserError(
                f"deepspeed.zero_stage: 3 cannot shard a model that has convolutions ({convolution}); set it to 2"
            )
        config, optim = self.engine_config(), make_optimizer(groups, optimizer, offload=self.settings.offload)
        scheduler = make_scheduler(optim, schedule, num_updates)
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optim, lr_scheduler=scheduler, config=config, dist_init_required=False
        )
        self.nonfinite = NonFiniteCheck(trainable(module))
        return engine

    def engine_config(self) -> dict[str, Any]:
        """OpenRLHF's DeepSpeed config with the user's own JSON merged over it."""
        config = self.get_ds_train_config(None)
        config["steps_per_print"] = 10**9
        config["train_batch_size"] = self.world_size
        # The recipe rejects Adafactor above stage 0; torch's AdamW is elementwise, so partitioning does not affect it.
        config["zero_allow_untested_optimizer"] = True
        if self.settings.offload and self.stage == 3:
            config["zero_optimization"]["offload_param"] = {"device": "cpu"}
        if self.stage == 3 and self.device.type == "cpu":
            # DeepSpeed (0.19.6) starts the gathers of several parameters and waits for the last one only. NCCL finishes
            # them in order, gloo does not: a parameter would then be read from uninitialised memory.
            config["zero_optimization"]["stage3_allgather_sequential"] = True
        if self.settings.config is not None:
            config = _merged(config, _read_json(self.settings.config))
        return config

    def zero_layout(self) -> dict[str, Any]:
        """What DeepSpeed's checkpoint files depend on besides the number of ranks, as JSON."""
        own = {} if self.settings.config is None else _read_json(self.settings.config)
        return {"stage": self.stage, "offload": self.settings.offload, "config": own}

    def update(self, engine: deepspeed.DeepSpeedEngine, loss: Tensor, last: bool) -> None:
        """Backward of one micro-batch; with `last`, also gradient reduction, optimizer step and schedule step.

        Args:
            loss: normalised over the whole batch and multiplied by the number of ranks, as OpenRLHF's losses with
                `dp_size`, since DeepSpeed averages gradients over ranks.

        Raises:
            NonFiniteError: on every rank, before the optimizer step, if a gradient or another watched tensor of the
                batch is not finite.
        """
        self.nonfinite.watch("loss", loss)
        engine.set_gradient_accumulation_boundary(last)
        shared = self.world_size > 1 and (last or self.stage == 3)
        with watchdog.waiting("the reduction of gradients") if shared else nullcontext():
            engine.backward(loss, scale_wrt_gas=False)
            if last and self.stage and engine.zero_use_cpu_optimizer():
                # Else DeepSpeed (0.19.6) steps without the gradients of parameters that only earlier micro-batches
                # reached: with ppo.critic: adapter, without the policy's.
                engine.optimizer.finalize_gradient_accumulation_boundary()
            if shared:
                self._settle()
        if last:
            self.before_step(engine)
            self._stepping = True  # until the step is whole: if it fails, weights and state may be half-updated
            with watchdog.waiting("the optimizer step") if shared else nullcontext():
                engine.step()
            self._clear_gradients(engine)
            self._stepping = False

    def discard(self, engine: deepspeed.DeepSpeedEngine) -> bool:
        """Discard the gradients of a minibatch that failed before its optimizer step, so that it can be repeated.

        Returns False where a repetition is unsound: with several ranks, of which only this one would repeat its
        forwards and reductions; under ZeRO 1 to 3, whose buffers may hold part of a gradient (DeepSpeed 0.19.6 has no
        way to reset them); and within the optimizer step.
        """
        if self.world_size > 1 or self.stage > 0 or self._stepping:
            return False
        engine.zero_grad()
        self.nonfinite.forget()
        return True

    def _clear_gradients(self, engine: deepspeed.DeepSpeedEngine) -> None:
        """Clear ZeRO's accumulated gradients.

        Under ZeRO 3 and offload, DeepSpeed (0.19.6) overwrites them in the first micro-batch of an update only. Where a
        parameter is reached later (with ppo.critic: adapter, the critic's), it adds to the gradient of the last update.
        """
        if self.stage == 3:
            engine.optimizer.grad_partitions_flat_buffer.zero_()
        elif self.stage and engine.zero_use_cpu_optimizer():
            for gradient in engine.optimizer.accumulated_grads_in_cpu.values():
                gradient.zero_()

    def before_step(self, engine: deepspeed.DeepSpeedEngine) -> None:
        """Check the reduced gradients.

        Raises:
            NonFiniteError: on every rank, if a watched tensor is not finite.
        """
        self.nonfinite.check(self.sum)
        if self.stage == 0:  # DeepSpeed (0.19.6) stores the norm under ZeRO only
            gradients = [p.grad for p in trainable(engine.module).values() if p.grad is not None]
            self._grad_norm = float(torch.nn.utils.get_total_norm(gradients))

    def get_grad_norm(self, model: nn.Module) -> float:
        """Norm of the last update's gradients over all ranks, before clipping."""
        return self._grad_norm if self.stage == 0 else super().get_grad_norm(model)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, for all trained parameters."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all trained parameters on CPU, gathered where ZeRO 3 shards them. Call it on every rank."""
    named = trainable(module)
    with deepspeed.zero.GatheredParameters(_sharded(named)):
        return {name: p.detach().cpu().clone() for name, p in named.items()}


def load_trainable_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Restore what `trainable_state` copied. Call it on every rank; under ZeRO 3 rank 0's copy is used."""
    named = trainable(module)
    sharded = _sharded(named)
    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0), torch.no_grad():
        if not sharded or dist.get_rank() == 0:
            for name, parameter in named.items():
                parameter.copy_(state[name])


def _sharded(named: dict[str, nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in named.values() if hasattr(p, "ds_id")]


def _read_json(path: str) -> dict[str, Any]:
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed.config: {path}: cannot be read as JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"deepspeed.config: {path}: expected a JSON object, got {type(config).__name__}")
    owned = [key for key in OWNED_BY_RECIPE if key in config]
    if owned:
        raise UserError(f"deepspeed.config: {path}: {', '.join(owned)} come from the recipe; remove them from the file")
    stage = config.get("zero_optimization", {}).get("stage")
    if stage is not None:
        raise UserError(f"deepspeed.config: {path}: set deepspeed.zero_stage: {stage} in the recipe, not in the file")
    return config


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result
