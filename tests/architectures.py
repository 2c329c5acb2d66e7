"""Every causal-LM architecture of transformers against itself: exact, or refused in one sentence.

A tiny random model of each is saved, loaded as a run loads it, and compared with transformers and peft alone: logprobs,
gradients of the adapter, greedy answers, and the saved adapter. `python tests/architectures.py` writes the table
`extensions/model/FAMILIES.md`.
"""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from conftest import tiny_tokenizer
from peft import PeftModel
from support import CPU
from tiny_models import causal_classes, shrunk
from transformers import AutoModelForCausalLM, GenerationConfig

from extensions.common.errors import UserError
from extensions.distributed.strategy import trainable_state
from extensions.model.loading import load_policy
from extensions.model.policy import Policy
from extensions.prefix.tree import Sample, pack
from extensions.prompts import CLOSE
from extensions.recipe import Lora, Model
from extensions.rollout.sampler import GenerationRequest, Sampler

TABLE = Path(__file__).parent.parent / "extensions" / "model" / "FAMILIES.md"
WRITTEN = 6  # tokens of each greedy answer


@dataclass(frozen=True)
class Verdict:
    kind: str  # packed, masked, plain; refused; not built
    detail: str


def rows() -> list[Sample]:
    """Prompts shorter and longer than the tiny models' windows of 24, three with a long prefix in common, two of one
    length."""
    generator = torch.Generator().manual_seed(7)

    def ids(count: int) -> list[int]:
        return torch.randint(5, 300, (count,), generator=generator).tolist()

    prefix = ids(40)
    shared = [Sample([*prefix, *ids(own)], ids(written)) for own, written in ((3, 4), (9, 2), (17, 6))]
    return [*shared, Sample(ids(5), ids(3)), Sample(ids(31), ids(5)), Sample(ids(31), ids(2))]


def save(model_type: str, folder: Path) -> None:
    """A random model with weights so large that each of its parts affects the output."""
    config_class, _ = causal_classes()[model_type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(shrunk(config_class), attn_implementation="eager").float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3)
            model(input_ids=torch.arange(5, 75)[None], use_cache=False)
    model.save_pretrained(folder)


def load(folder: Path) -> Policy:
    """Load a model as a run does, with an adapter that changes its output."""
    policy = load_policy(Model(path=str(folder)), Lora(rank=4, dropout=0.0), "shared", 1.0, CPU, 0, "base")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.trainable.items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return policy


def check(policy: Policy, folder: Path) -> None:
    """Compare the policy with plain peft and transformers on the same files; the adapter is written beside them."""
    policy.save_adapter(folder / "adapter", trainable_state(policy))
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    alone = PeftModel.from_pretrained(base, str(folder / "adapter"), is_trainable=True).eval()
    samples = rows()
    policy.eval()
    with policy.role("actor"):
        found = policy(pack(samples), values=False)["logprobs"]
        weights = torch.linspace(-1, 1, len(found))
        (found * weights).sum().backward()
    own = torch.cat([_logprobs(alone, sample) for sample in samples])
    torch.testing.assert_close(found, own, atol=2e-5, rtol=2e-5)
    (own * weights).sum().backward()
    expected = {name: p.grad for name, p in alone.named_parameters() if p.requires_grad}
    gradients = {name.removeprefix("lm."): p.grad for name, p in policy.trainable.items() if "lora_" in name}
    assert gradients.keys() == expected.keys() and any(g is not None and g.any() for g in gradients.values())
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    for name, gradient in expected.items():
        if gradient is None:
            assert gradients[name] is None or not gradients[name].any(), name
        else:
            torch.testing.assert_close(gradients[name], gradient, atol=1e-4 * largest, rtol=1e-3, msg=name)
    _check_greedy(policy, alone, samples)


def _logprobs(model: PeftModel, sample: Sample) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([[*sample.prompt, *sample.response]]), use_cache=False).logits
    logprobs = logits[0, len(sample.prompt) - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(sample.response)[:, None])[:, 0]


@torch.no_grad()
def _check_greedy(policy: Policy, alone: PeftModel, samples: list[Sample]) -> None:
    """Answers of different budgets, so that rows finish at different steps."""
    sampler = Sampler(policy, tiny_tokenizer(), CLOSE, 8)
    sampler.eos, sampler.may_stop = set(), set()
    settings = alone.get_base_model().generation_config = GenerationConfig(
        max_new_tokens=WRITTEN, do_sample=False, pad_token_id=0
    )
    requests = [GenerationRequest(s.prompt, WRITTEN - k % 3, np.zeros(WRITTEN)) for k, s in enumerate(samples)]
    for request, response in zip(requests, sampler.sample(requests, greedy=True), strict=True):
        ids = torch.tensor([list(request.prompt)])
        assert response.tokens == _greedy(alone, ids, request.budget)
        if policy.path.cache != "none":  # else `generate` itself differs from the model's forward
            by_cache = alone.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            assert response.tokens == by_cache[0, ids.shape[1] :].tolist()[: request.budget]


def _greedy(model: PeftModel, ids: torch.Tensor, count: int) -> list[int]:
    for _ in range(count):
        logits = model(input_ids=ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, -count:].tolist()


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of models and peft about odd configurations."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity(verbosity)


def verdict(model_type: str, folder: Path) -> Verdict:
    """The result for an architecture. Raises if it is neither exact nor refused."""
    try:
        save(model_type, folder)
    except Exception as error:  # whatever a configuration without its own values raises
        return Verdict("not built", f"{type(error).__name__}: {_short(error)}")
    try:
        policy = load(folder)
    except UserError as error:
        return Verdict("refused", _short(str(error).replace(str(folder), "MODEL")))
    check(policy, folder)
    path = policy.path
    detail = {"packed": "", "masked": f"{path.attention} attention", "plain": f"cache: {path.cache}"}[path.kind]
    return Verdict(path.kind, detail)


def _short(error: object) -> str:
    return re.sub(r"\s+", " ", str(error))[:160]


def table() -> str:
    """The table of all architectures, in Markdown."""
    found = {}
    for model_type in sorted(causal_classes()):
        with tempfile.TemporaryDirectory() as name:
            found[model_type] = verdict(model_type, Path(name))
    counts = Counter(one.kind for one in found.values())
    order = ("packed", "masked", "plain", "refused", "not built")
    lines = [
        "# Model families",
        "",
        f"Every architecture that transformers {transformers.__version__} lists as a causal LM, as a tiny random model "
        "in float32, compared with itself in plain transformers and peft: logprobs, gradients, greedy answers, the "
        "saved adapter. Written by `python tests/architectures.py`; a test compares it with the code.",
        "",
        "- packed: shared prefixes are computed once, and no masked query-key pair is computed",
        "- masked: shared prefixes are computed once, with a dense mask for the model's own attention",
        "- plain: the model's own forward on whole rows; nothing is shared. It decodes with a padded cache, with a "
        "cache for the rows of each length, or with none, which is slow",
        "- refused: by `nlu check` and every run, with this error. Encoders are not causal; some have a decoder form, "
        "chosen in their own configuration (`is_decoder`)",
        "- not built: no small model could be made from the configuration's defaults",
        "",
        "What a run does with its model is decided by the same comparison, on its own rows and in its dtype; "
        "`nlu check RECIPE` shows it.",
        "",
        " | ".join(f"{counts[kind]} {kind}" for kind in order),
        "",
        "| model type | path | |",
        "|---|---|---|",
        *(f"| `{name}` | {one.kind} | {one.detail.replace('|', '/')} |" for name, one in found.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with quiet():
        text = table()
    TABLE.write_text(text, encoding="utf-8")
    sys.exit(0)
