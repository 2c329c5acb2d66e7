"""The vLLM engine: its arguments for a recipe, its requests, and an engine in this process.

The only module besides `extensions.ray_backend` that imports vllm, and only inside functions.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from extensions.common.errors import UserError
from extensions.model.loading import load_config, model_folder, prompt_limit
from extensions.prefix.tree import Sample
from extensions.recipe import Recipe
from extensions.rollout.lora_sync import LoraPayload, SyncError

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of max_lora_rank that vLLM 0.29 accepts
QUEUED_ROWS = 1024  # of an evaluation, given to an engine at once: a stop request waits for them
MIN_BATCHED_TOKENS = 4096  # per step of a CPU engine, whose prompts are not chunked


def require_installed(*packages: str) -> None:
    """Raises UserError, with instructions, if a package is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not installed in this environment: on a CPU `bash launch/test_ray.sh` creates "
            ".venv-ray, which launch/ppo_ray.sh finds by itself; on GPUs launch/setup.sh installs them"
        )


def set_vllm_environment() -> None:
    """Defaults of environment variables that vLLM reads on import; variables that are set keep their values."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the default binds cores that the ranks share


def check_vllm_supports(config: Any) -> None:
    """Raises UserError if vLLM cannot serve a model of this configuration with LoRA."""
    import vllm
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.interfaces import supports_lora

    # The configuration of a GGUF file names no class.
    names = getattr(config, "architectures", None) or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)]
    known = next((name for name in names if name in ModelRegistry.get_supported_archs()), None)
    if known is not None and supports_lora(ModelRegistry.models[known].load_model_cls()):
        return
    lacks = ", ".join(map(str, names)) if known is None else f"LoRA for {known}"
    raise UserError(
        f"model.path: vLLM {vllm.__version__} has no {lacks}, so it cannot sample from this model; use "
        "backend: deepspeed with rollout.backend: hf"
    )


def vllm_arguments(recipe: Recipe, on_cpu: bool, lora_rank: int) -> dict[str, Any]:
    """Arguments of a vLLM engine.

    Raises:
        UserError: vLLM does not support the model, or no LoRA for it.
    """
    config = load_config(recipe.model)
    check_vllm_supports(config)
    context = prompt_limit(recipe, config) + recipe.rollout.max_new_tokens
    arguments: dict[str, Any] = {
        "model": str(model_folder(recipe.model)),
        "dtype": str(vllm_dtype(recipe, on_cpu)).removeprefix("torch."),
        "max_model_len": context,
        "enable_lora": True,
        "max_lora_rank": next((rank for rank in LORA_RANKS if rank >= lora_rank), LORA_RANKS[-1]),
        "max_loras": 1,
        "enable_prefix_caching": True,
        "enforce_eager": recipe.vllm.enforce_eager or on_cpu,
        "gpu_memory_utilization": recipe.vllm.gpu_memory_utilization,
        "seed": recipe.seed,
        "trust_remote_code": recipe.model.trust_remote_code,
        "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from, temperature included
        "disable_log_stats": True,
    }
    if on_cpu:
        # A seeded request with a chunked prompt crashes a CPU engine ("CPU Generator does not use offset", vLLM 0.29).
        arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(context, MIN_BATCHED_TOKENS)}
    return arguments


def vllm_dtype(recipe: Recipe, on_cpu: bool) -> torch.dtype:
    """The dtype of the base, the same in vLLM and in the trainer."""
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return named.get(recipe.model.dtype, torch.float32 if on_cpu else torch.bfloat16)


# -------------------------------------------------------------------------------------------------------- requests


def sampling_params(budget: int, seed: int, temperature: float, greedy: bool, stop: str, eos: Sequence[int]) -> Any:
    """One response of at most `budget` tokens, which ends with the text `stop` or at an EOS token."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0 if greedy else temperature,
        seed=seed,
        max_tokens=budget,
        stop=[stop],
        include_stop_str_in_output=True,
        stop_token_ids=list(eos),
        logprobs=0,
    )


def sampled_tokens(output: Any) -> tuple[list[int], list[float]]:
    """Tokens of a request's one response and their logprobs."""
    response = output.outputs[0]
    tokens = list(response.token_ids)
    return tokens, [step[token].logprob for step, token in zip(response.logprobs, tokens, strict=True)]


def probe_params() -> Any:
    """Requests the logprobs of a prompt; vLLM must generate at least one token."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)


def prompt_logprobs(output: Any, count: int) -> list[float]:
    """Logprobs of the last `count` tokens of a request's prompt, at temperature 1."""
    tokens = output.prompt_token_ids[-count:]
    return [step[token].logprob for step, token in zip(output.prompt_logprobs[-count:], tokens, strict=True)]


@contextmanager
def only_device(device: torch.device) -> Iterator[None]:
    """Context in which new processes see one GPU: that of this rank.

    vLLM (0.29) runs an engine in a process of its own, which takes the first GPU that it sees. Without this context,
    that would be GPU 0 on every rank. This process has its devices already, so the variable no longer changes them.
    """
    if device.type != "cuda":
        yield
        return
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    index = device.index if device.index is not None else torch.cuda.current_device()
    visible = before.split(",") if before else [str(k) for k in range(torch.cuda.device_count())]
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[index].strip()
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


class LoraSlot:
    """The adapter that a vLLM engine serves: its newest version, as a LoRA request and a folder of files."""

    def __init__(self) -> None:
        self.version = 0
        self.request: Any = None
        self.folder: tempfile.TemporaryDirectory[str] | None = None

    def replace(self, payload: LoraPayload) -> tuple[Any, int | None]:
        """The LoRA request of a new version, and the id of the one that the engine must remove."""
        from vllm.lora.request import LoRARequest

        if self.folder is not None:
            self.folder.cleanup()
        self.folder = tempfile.TemporaryDirectory(prefix=f"nlu-adapter-{payload.version}-")
        payload.write(Path(self.folder.name))
        old, self.version = self.version or None, payload.version
        self.request = LoRARequest(f"policy-{payload.version}", payload.version, self.folder.name)
        return self.request, old


class VllmEngine:
    """A vLLM engine in this process, one per rank.

    Args:
        arguments: `vllm_arguments`.
        sleep: free the engine's GPU memory outside of `awake`.
        device: of the rank.
    """

    def __init__(self, arguments: dict[str, Any], sleep: bool, device: torch.device) -> None:
        set_vllm_environment()
        from vllm import LLM

        self.sleeps = sleep and device.type == "cuda"
        with only_device(device):
            self.llm = LLM(**arguments, enable_sleep_mode=self.sleeps)
        self.lora = LoraSlot()
        self._asleep = False

    def load(self, payload: LoraPayload) -> None:
        """Serve a new version of the adapter from now on.

        Raises:
            SyncError: vLLM refuses it.
        """
        request, old = self.lora.replace(payload)
        if old is not None:
            self.llm.llm_engine.remove_lora(old)
        if not self.llm.llm_engine.add_lora(request):
            raise SyncError(f"vLLM refused version {payload.version} of the adapter")
        self.llm.reset_prefix_cache()

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> list[Any]:
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return list(self.llm.generate(inputs, list(params), use_tqdm=False, lora_request=self.lora.request))

    def probe(self, samples: Sequence[Sample]) -> list[float]:
        """Logprobs of all response tokens, in order."""
        # One request at a time: with LoRA on a CPU, vLLM 0.29 mixes up the rows of prompt logprobs and crashes.
        logprobs: list[float] = []
        for sample in samples:
            output = self.generate([[*sample.prompt, *sample.response]], [probe_params()])[0]
            logprobs += prompt_logprobs(output, len(sample.response))
        return logprobs

    @contextmanager
    def awake(self) -> Iterator[None]:
        """On a GPU the engine holds its memory only inside this context."""
        if self._asleep:
            self.llm.wake_up()
            self._asleep = False
        try:
            yield
        finally:
            if self.sleeps:
                self.llm.sleep(level=1)
                self._asleep = True
