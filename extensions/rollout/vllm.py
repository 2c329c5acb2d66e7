"""vLLM as the rollout engine: what the DeepSpeed loop (`rollout.backend: vllm`) and the Ray engine share.

The base is frozen, so only the adapter travels: after each update it is a new LoRA request, with a new number, which no
cached prefix of an older one can serve. OpenRLHF's own weight sync cannot do that (its issues 546, 991, 1349; checked
with 0.11.2): the names of adapter weights have no target in the engine.

A sync is not believed but checked, on the tokens of some training rows:

- at the start a random adapter is sent, and engine and trainer must agree on it: every layer has its place and scale;
- after each sync they must agree on the policy, within `vllm.probe_tolerance`;
- if the trainer's adapter has changed, the engine's logprobs must have changed too: a sync that delivers nothing would
  otherwise look like a stale policy (verl's issue 7495).

The only module besides `extensions.ray_backend` that imports vllm, inside functions.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from extensions.common.errors import UserError
from extensions.data import Example
from extensions.distributed import watchdog
from extensions.distributed.strategy import Strategy, load_trainable_state, trainable_state
from extensions.model.loading import load_config, model_folder, prompt_limit
from extensions.model.policy import Policy
from extensions.prefix.logprobs import mean_and_worst
from extensions.prefix.tree import Sample, micro_batches, pack
from extensions.prompts import CLOSE, PromptEncoder
from extensions.recipe import Recipe
from extensions.rollout.sampler import GenerationRequest, Response, Sampler

PROBED = 64  # last tokens of a prompt whose logprobs are compared, besides those of the right answer
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # nats, mean over the probed tokens
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of LoRA, that vLLM 0.29 has room for
MOST_TOKENS = 4096  # of prompts that a CPU engine reads at once, if no prompt may be longer
CANARY_STD = 0.02  # of the random adapter's B matrices: it moves a logprob by a nat or so


class SyncError(Exception):
    """The rollout engine does not compute what the trainer's policy does; the message says what was found."""


@dataclass(frozen=True)
class Adapter:
    """The policy's adapter on its way to the engines, in PEFT's format."""

    version: int  # of the weights: 1, 2, ...
    config: bytes  # adapter_config.json
    weights: bytes  # adapter_model.safetensors

    @staticmethod
    def of(policy: Policy, state: dict[str, Tensor], version: int) -> Adapter:
        """
        Args:
            state: all trained parameters, whole (`strategy.trainable_state`).
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            policy.save_adapter(folder, state)
            weights = (folder / "adapter_model.safetensors").read_bytes()
            return Adapter(version, (folder / "adapter_config.json").read_bytes(), weights)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.weights).hexdigest()

    def write(self, folder: Path) -> Path:
        """Put the files where an engine reads them: a folder of this version in `folder`."""
        own = folder / f"adapter-{self.version}"
        own.mkdir()
        (own / "adapter_config.json").write_bytes(self.config)
        (own / "adapter_model.safetensors").write_bytes(self.weights)
        return own


class Adapters:
    """The version that an engine uses; older ones are removed from it. Calls its methods `add_lora` and so on."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="nlu-adapter-"))
        self.version = 0
        self.request: Any = None

    def next(self, adapter: Adapter) -> tuple[Any, int | None]:
        """The LoRA request of a new version, and the number of the one to remove."""
        from vllm.lora.request import LoRARequest

        old = self.version or None
        path = adapter.write(self.folder)
        self.request = LoRARequest(f"policy-{adapter.version}", adapter.version, str(path))
        self.version = adapter.version
        for other in self.folder.iterdir():
            if other != path:
                shutil.rmtree(other, ignore_errors=True)
        return self.request, old

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------------- what engines are told


def engine_options(recipe: Recipe, on_cpu: bool, rank: int) -> dict[str, Any]:
    """Arguments of vLLM's engine for a recipe.

    Args:
        rank: of the adapter.

    Raises:
        UserError: vLLM has no such model, or no LoRA for it.
    """
    config = load_config(recipe.model)
    check_family(config)
    context = prompt_limit(recipe, config) + recipe.rollout.max_new_tokens
    whole_prompts: dict[str, Any] = {}
    if on_cpu:
        # A seeded row whose prompt is cut ends a CPU engine ("CPU Generator does not use offset", vLLM 0.29).
        whole_prompts = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(context, MOST_TOKENS)}
    return whole_prompts | {
        "model": str(model_folder(recipe.model)),
        "dtype": str(engine_dtype(recipe, on_cpu)).removeprefix("torch."),
        "max_model_len": context,
        "enable_lora": True,
        "max_lora_rank": next((room for room in RANKS if room >= rank), RANKS[-1]),
        "max_loras": 1,
        "enable_prefix_caching": True,
        "enforce_eager": recipe.vllm.enforce_eager or on_cpu,
        "gpu_memory_utilization": recipe.vllm.gpu_memory_utilization,
        "seed": recipe.seed,
        "trust_remote_code": recipe.model.trust_remote_code,
        "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from, temperature included
        "disable_log_stats": True,
    }


def engine_dtype(recipe: Recipe, on_cpu: bool) -> torch.dtype:
    """Of the base, in the engine and in the trainer alike."""
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return named.get(recipe.model.dtype, torch.float32 if on_cpu else torch.bfloat16)


def check_family(config: Any) -> None:
    """Raises UserError where vLLM cannot serve a model's family with LoRA."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.interfaces import supports_lora

    # The configuration of a GGUF file names no class.
    names = list(getattr(config, "architectures", None) or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)])
    known = [name for name in names if name in ModelRegistry.get_supported_archs()]
    why = f"vLLM {_vllm_version()} has no {', '.join(map(str, names))}"
    if known:
        model = ModelRegistry.models[known[0]].load_model_cls()
        if supports_lora(model):
            return
        why = f"vLLM {_vllm_version()} has no LoRA for {known[0]}"
    raise UserError(f"model.path: {why}, so it cannot sample here; use backend: deepspeed with rollout.backend: hf")


def _vllm_version() -> str:
    import vllm

    return str(vllm.__version__)


def require(*packages: str) -> None:
    """Raises UserError, with what to do, where a package is not installed."""
    import importlib.util

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not installed in this environment: on a CPU `bash launch/test_ray.sh` makes "
            ".venv-ray, which launch/ppo_ray.sh finds by itself; on GPUs the set of launch/setup.sh has them"
        )


def engine_environment() -> None:
    """Defaults of the environment that vLLM reads when it is imported; what the user set is left alone."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # by default it binds cores that the ranks use too


def sampling_params(budget: int, seed: int, temperature: float, greedy: bool, eos: Sequence[int]) -> Any:
    """One multinomial response of at most `budget` tokens that ends at `</Judgement>` and keeps it."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0 if greedy else temperature,
        seed=seed,
        max_tokens=budget,
        stop=[CLOSE],
        include_stop_str_in_output=True,
        stop_token_ids=list(eos),
        logprobs=0,
    )


def sampled(output: Any) -> tuple[list[int], list[float]]:
    """Tokens of a request's one response and their logprobs."""
    response = output.outputs[0]
    tokens = list(response.token_ids)
    return tokens, [step[token].logprob for step, token in zip(response.logprobs, tokens, strict=True)]


def probe_params() -> Any:
    """Asks for the logprobs of a prompt; vLLM must write a token all the same."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)


def probed(output: Any, count: int) -> list[float]:
    """Logprobs of the last `count` tokens of a request's prompt, at temperature 1."""
    tokens = output.prompt_token_ids[-count:]
    return [step[token].logprob for step, token in zip(output.prompt_logprobs[-count:], tokens, strict=True)]


# ------------------------------------------------------------------------------------------------------ the check


def probe_samples(examples: Sequence[Example], encoder: PromptEncoder, count: int) -> list[Sample]:
    """What is compared: the ends of some training prompts with their right answers."""
    samples = []
    for example in examples[:: max(1, len(examples) // count)][:count]:
        ids, text = encoder.encode(example.task, example.fields)
        answer = encoder.answer_ids(ids, text, example.task.answer(str(example.label)))
        samples.append(Sample(ids[:-PROBED] or ids[:1], [*ids[len(ids[:-PROBED] or ids[:1]) :], *answer]))
    return samples


def trainer_logprobs(
    policy: Policy, samples: Sequence[Sample], micro_batch_size: int, temperature: float = 1.0
) -> list[float]:
    """Logprobs of all response tokens, in order; under the policy's role."""
    by_row: dict[int, list[float]] = {}
    with torch.no_grad():
        for rows in micro_batches(samples, range(len(samples)), micro_batch_size):
            packed = pack([samples[i] for i in rows], policy.device)
            flat = policy(packed, values=False, temperature=temperature)["logprobs"].cpu()
            by_row |= {i: part.tolist() for i, part in zip(rows, flat.split(packed.lengths), strict=True)}
    return [value for i in range(len(samples)) for value in by_row[i]]


def canary_state(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The trained parameters with random B matrices in their adapters, which a fresh adapter has at zero."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator).to(tensor) * CANARY_STD if ".lora_B." in name else tensor
        for name, tensor in state.items()
    }


class Probe:
    """Compares engine and trainer after each sync.

    Args:
        dtype: of the base.
        tolerance: recipe key vllm.probe_tolerance; None: by `dtype`.
    """

    def __init__(self, dtype: torch.dtype, tolerance: float | None) -> None:
        self.dtype, self.tolerance = dtype, TOLERANCE[dtype] if tolerance is None else tolerance
        self._last: tuple[str, list[list[float]]] | None = None  # digest of the adapter, logprobs of each engine

    def check(
        self, digest: str, trainer: Sequence[float], engines: Sequence[Sequence[float]], what: str
    ) -> dict[str, Any]:
        """What the metrics say of a sync.

        Args:
            digest: of the adapter that was sent.
            trainer: logprobs of the probed tokens, by the trainer.
            engines: the same by each engine.
            what: was sent, in words.

        Raises:
            SyncError: they differ by more than the tolerance, or a new adapter changed nothing in an engine.
        """
        mean = worst = 0.0
        for number, engine in enumerate(engines):
            own_mean, own_worst = mean_and_worst(torch.tensor(trainer), torch.tensor(engine))
            if not own_mean <= self.tolerance:  # NaN too
                raise SyncError(
                    f"after {what} was sent, engine {number} and the trainer differ by {own_mean:.2g} nats a token on "
                    f"average (at most {own_worst:.2g}) over {len(trainer)} probed tokens, more than "
                    f"{self.tolerance:g} (vllm.probe_tolerance): the engine does not sample from the policy that is "
                    "trained. Nothing was updated from such samples"
                )
            mean, worst = max(mean, own_mean), max(worst, own_worst)
        if self._last is not None and self._last[0] != digest and self.dtype == torch.float32:
            # In bfloat16 a small update may well be lost in rounding.
            for number, (old, new) in enumerate(zip(self._last[1], engines, strict=True)):
                if list(old) == list(new):
                    raise SyncError(
                        f"after {what} was sent, the logprobs of engine {number} are those of the adapter before it, "
                        f"bit for bit, on {len(trainer)} probed tokens: the sync delivered nothing"
                    )
        self._last = (digest, [list(engine) for engine in engines])
        return {"probe_mean": mean, "probe_max": worst, "probe_tokens": len(trainer)}

    def check_samples(self, mismatch: float) -> None:
        """Look at what was sampled, before anything is learned from it.

        Args:
            mismatch: mean absolute difference of its logprobs by engine and trainer, in nats a token.

        Raises:
            SyncError: it is beyond the tolerance.
        """
        if not mismatch <= self.tolerance:
            raise SyncError(
                f"the logprobs of what was sampled differ by {mismatch:.2g} nats a token between engine and trainer, "
                f"more than {self.tolerance:g} (vllm.probe_tolerance): the samples are not the policy's. Nothing was "
                "updated from them"
            )


# ------------------------------------------------------------------------------------------------------- the sync


class Sync(ABC):
    """Keeps engines at the policy's weights, and looks whether they are. Wherever policy and engines live."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.version, self.digest = 0, ""  # of what the engines have
        self.found: dict[str, Any] = {}  # for the metrics

    def refresh(self) -> None:
        """Send the adapter if it is not the one that the engines have. Call it on every rank.

        Raises:
            SyncError: an engine does not compute what the policy does.
        """
        if not self.digest:
            with self.canary():
                self._send("a random adapter")
        self._send(f"version {self.version + 1} of the adapter")

    def _send(self, what: str) -> None:
        adapter = self.adapter(self.version + 1)
        if adapter.digest == self.digest:
            return
        self.deliver(adapter)
        self.version, self.digest = adapter.version, adapter.digest
        self.found = self.probe.check(self.digest, self.trainer_logprobs(), self.engine_logprobs(), what)

    @abstractmethod
    def canary(self) -> AbstractContextManager[None]:
        """The policy has a random adapter meanwhile (`canary_state`)."""

    @abstractmethod
    def adapter(self, version: int) -> Adapter:
        """The policy's, as it travels."""

    @abstractmethod
    def deliver(self, adapter: Adapter) -> None:
        """Have all engines use it."""

    @abstractmethod
    def trainer_logprobs(self) -> list[float]:
        """Of the probed tokens."""

    @abstractmethod
    def engine_logprobs(self) -> list[list[float]]:
        """The same by each engine."""


# ------------------------------------------------------------------------------------------- under the DeepSpeed loop


class Engine:
    """A vLLM engine of this process's own: one a rank."""

    def __init__(self, options: dict[str, Any], sleep: bool) -> None:
        engine_environment()
        from vllm import LLM

        self.sleeps = sleep and torch.cuda.is_available()
        self.llm = LLM(**options, enable_sleep_mode=self.sleeps)
        self.adapters = Adapters()
        self._awake = True

    def load(self, adapter: Adapter) -> None:
        """Use a new version of the adapter from now on."""
        request, old = self.adapters.next(adapter)
        if old is not None:
            self.llm.llm_engine.remove_lora(old)
        if not self.llm.llm_engine.add_lora(request):
            raise SyncError(f"vLLM refused version {adapter.version} of the adapter")
        self.llm.reset_prefix_cache()

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> list[Any]:
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return list(self.llm.generate(inputs, list(params), use_tqdm=False, lora_request=self.adapters.request))

    def probe(self, samples: Sequence[Sample]) -> list[float]:
        # One at a time: with LoRA on a CPU vLLM (0.29) mixes up the rows of several prompts' logprobs, and dies of it.
        found: list[float] = []
        for sample in samples:
            output = self.generate([[*sample.prompt, *sample.response]], [probe_params()])[0]
            found += probed(output, len(sample.response))
        return found

    @contextmanager
    def awake(self) -> Iterator[None]:
        """On a GPU the engine has its memory inside this alone."""
        if self.sleeps and not self._awake:
            self.llm.wake_up()
        self._awake = True
        try:
            yield
        finally:
            if self.sleeps:
                self.llm.sleep(level=1)
                self._awake = False


class VllmSampler(Sampler):
    """Engine `vllm`: tokens and their logprobs by vLLM; likelihoods of given answers by the policy itself.

    Args:
        sync: of the rank's one engine.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        micro_batch_size: int,
        fixed_decode_steps: int | None,
        sync: LocalSync,
    ) -> None:
        super().__init__(policy, tokenizer, micro_batch_size, fixed_decode_steps)
        self.sync = sync

    exact = False  # logprobs are rounded otherwise than the trainer's, and there are no values

    @contextmanager
    def session(self) -> Iterator[None]:
        with self.sync.engine.awake():
            self.sync.refresh()
            yield

    @property
    def metrics(self) -> dict[str, Any]:
        return self.sync.found

    def check_logprob_mismatch(self, mismatch: float) -> None:
        self.sync.probe.check_samples(mismatch)

    def _sample(self, requests: Sequence[GenerationRequest], greedy: bool) -> list[Response]:
        watchdog.heartbeat()
        params = [
            sampling_params(r.budget, request_seed(r), self.policy.temperature, greedy, sorted(self.eos))
            for r in requests
        ]
        responses = []
        for output in self.sync.engine.generate([r.prompt for r in requests], params):
            tokens, logprobs = sampled(output)
            known = torch.tensor(logprobs, device=self.policy.device)
            responses.append(Response(tokens, known, torch.zeros_like(known), self.decode(tokens)))
        return responses


def make_sampler(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    micro_batch_size: int,
    fixed_decode_steps: int | None,
    sync: LocalSync | None,
) -> Sampler:
    """The sampler of a recipe's `rollout.backend`."""
    if sync is None:
        return Sampler(policy, tokenizer, micro_batch_size, fixed_decode_steps)
    return VllmSampler(policy, tokenizer, micro_batch_size, fixed_decode_steps, sync)


def request_seed(request: GenerationRequest) -> int:
    """A seed of a request's own, from its own random numbers."""
    return int(float(request.uniforms[0]) * 2**31)


class LocalSync(Sync):
    """Of a rank's own engine and policy.

    Args:
        samples: for the probe.
    """

    def __init__(
        self, recipe: Recipe, policy: Policy, strategy: Strategy, samples: Sequence[Sample], say: Callable[[str], None]
    ) -> None:
        on_cpu = strategy.device.type == "cpu"
        super().__init__(Probe(engine_dtype(recipe, on_cpu), recipe.vllm.probe_tolerance))
        self.policy, self.samples, self.seed = policy, list(samples), recipe.seed
        self.micro_batch_size = recipe.evaluation.micro_batch_size
        say("starting a vLLM engine a rank")
        self.engine = Engine(engine_options(recipe, on_cpu, policy.lm.peft_config["default"].r), recipe.vllm.sleep)

    @contextmanager
    def canary(self) -> Iterator[None]:
        state = trainable_state(self.policy)
        load_trainable_state(self.policy, canary_state(state, self.seed))
        try:
            yield
        finally:
            load_trainable_state(self.policy, state)

    def adapter(self, version: int) -> Adapter:
        return Adapter.of(self.policy, trainable_state(self.policy), version)

    def deliver(self, adapter: Adapter) -> None:
        self.engine.load(adapter)

    def trainer_logprobs(self) -> list[float]:
        self.policy.eval()
        with self.policy.role("actor"):
            return trainer_logprobs(self.policy, self.samples, self.micro_batch_size)

    def engine_logprobs(self) -> list[list[float]]:
        return [self.engine.probe(self.samples)]
