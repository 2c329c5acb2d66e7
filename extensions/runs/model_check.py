"""`nlu check`: a recipe's model, loaded and compared with its own forward and with `generate`."""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from extensions.data import Example
from extensions.data.splits import RunData
from extensions.distributed.openrlhf import deepspeed
from extensions.model.anatomy import eager
from extensions.model.loading import load_policy
from extensions.model.policy import Policy
from extensions.model.proof import Difference, proof_rows
from extensions.prefix.tree import Sample
from extensions.prompts import CLOSE, PromptEncoder
from extensions.recipe import Recipe
from extensions.rollout.sampler import GenerationRequest, Sampler
from extensions.tasks import Task

GREEDY = 8  # tokens of each row that are compared with `generate`
GIB = 2**30
WORDS = "the quick brown fox jumps over the lazy dog and then runs home before it rains"


def check_model(
    recipe: Recipe, encoder: PromptEncoder, config: Any, with_data: bool, warn: Callable[[str], None]
) -> list[tuple[str, str]]:
    """Diagnostics of a recipe's model before training, as (name, value) pairs.

    Args:
        config: of the model.
        with_data: use rows of the recipe; False: generated rows.

    Raises:
        UserError: the model, its adapter or its tokenizer cannot be used.
    """
    for task in recipe.data.tasks:
        encoder.check_answers(task)
    examples = _examples(recipe, warn) if with_data else generated_rows(recipe.data.tasks)
    device = torch.device(deepspeed.accelerator.get_accelerator().current_device_name())
    rows = proof_rows(examples, encoder, config, recipe.rollout.max_new_tokens)
    policy = load_policy(
        recipe.model, recipe.lora, "none", 1.0, device, recipe.seed, "base", recipe.method != "eval", rows
    )
    sampler = Sampler(policy, encoder.tokenizer, CLOSE, recipe.evaluation.micro_batch_size)
    proof, lm, tokenizer = policy.proof, policy.causal_lm, encoder.tokenizer
    parameters = sum(p.numel() for p in lm.parameters() if not p.requires_grad)
    size = sum(p.numel() * p.element_size() for p in lm.parameters()) / GIB
    trained = sum(p.numel() for p in policy.trainable.values())
    names = Counter(name.rpartition(".")[2] for name in policy.adapted)
    source = "rows of the recipe" if with_data else "generated rows, since the recipe has no data.root"
    lines = [
        ("model", f"{proof.model} ({lm.config.model_type}), {parameters / 1e6:.1f} M parameters, {proof.dtype}"),
        ("path", str(proof.path)),
        *(("not used", why) for why in proof.rejected),
        ("forward", f"{_apart(proof.forward)} ({source})"),
        ("decoding", _apart(proof.decoding)),
        ("greedy answers", greedy_agreement(policy, sampler, rows)),
        ("head", proof.head),
        ("LoRA", f"{', '.join(f'{count} x {name}' for name, count in names.items())}; {trained / 1e6:.2f} M trained"),
        ("BOS, EOS", f"{_token(tokenizer.bos_token)}; ends at {_tokens(sampler, sorted(sampler.eos))} or {CLOSE}"),
        ("prompt form", "the tokenizer's chat template" if encoder.template else "plain (paper 4.1)"),
        *((f"answers of {task.name}", _answers(task, encoder)) for task in recipe.data.tasks),
        ("context", f"prompts of at most {encoder.max_tokens} tokens; those above: up to {_longest(rows)}"),
        ("memory", f"weights {size:.2f} GiB; this check took {_peak(device):.1f} GiB (training: nlu plan)"),
    ]
    return lines


def _examples(recipe: Recipe, warn: Callable[[str], None]) -> list[Example]:
    data = RunData.load(recipe, warn)
    return data.train or data.table


def generated_rows(tasks: Sequence[Task]) -> list[Example]:
    """Generated rows of three lengths for the first task."""
    task = tasks[0]
    label = next(iter(task.labels)) if task.labels else f"{(task.score_range or (0.0,))[0]:.1f}"
    return [Example(task, k, dict.fromkeys(task.fields, " ".join(WORDS.split()[: 4 + 5 * k])), label) for k in range(3)]


@torch.no_grad()
def greedy_agreement(policy: Policy, sampler: Sampler, rows: Sequence[Sample]) -> str:
    """The number of greedy tokens equal to those of the model's own `generate`, row by row."""
    policy.eval()
    same = count = 0
    unused = np.zeros(GREEDY)
    found = sampler.sample([GenerationRequest(sample.prompt, GREEDY, unused) for sample in rows], greedy=True)
    settings = GenerationConfig(
        max_new_tokens=GREEDY, do_sample=False, eos_token_id=sorted(sampler.eos), pad_token_id=0
    )
    for sample, response in zip(rows, found, strict=True):
        ids = torch.tensor([list(sample.prompt)], device=policy.device)
        with policy.role("actor"), eager(policy.causal_lm):
            own = policy.causal_lm.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        expected = own[0, ids.shape[1] :].tolist()[: len(response.tokens)]
        same += sum(a == b for a, b in zip(response.tokens, expected, strict=True))
        count += len(expected)
    return f"{same} of {count} tokens are those of model.generate"


def _apart(found: Difference) -> str:
    return f"{found.mean:.1g} nats on average, {found.largest:.1g} at most from its own forward, {found.tokens} tokens"


def _token(token: str | None) -> str:
    return "none" if token is None else repr(token)


def _tokens(sampler: Sampler, ids: Sequence[int]) -> str:
    return ", ".join(repr(sampler.tokenizer.decode([i])) for i in ids) or "no token"


def _answers(task: Task, encoder: PromptEncoder) -> str:
    found = encoder.label_ids(task).values()
    return "; ".join(" ".join(repr(encoder.tokenizer.decode([i])) for i in ids) for ids in found)


def _longest(rows: Sequence[Sample]) -> int:
    return max(len(sample.prompt) for sample in rows)


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
