"""Sampling: exact logprobs, budgets, the stop, and independence of batch layout."""

import numpy as np
import pytest
import torch
from support import ARCHITECTURES, make_policy, nested_prompts, samples

from extensions.model.loading import load_tokenizer
from extensions.prefix.decoding import TreeDecoder
from extensions.prefix.tree import Sample, pack
from extensions.prompts import CLOSE
from extensions.recipe import Model
from extensions.rollout.sampler import GenerationRequest, Sampler, random_numbers

BUDGETS = (12, 3, 7, 12, 1)


def requests(seed=0):
    return [
        GenerationRequest(sample.prompt, budget, random_numbers(seed, 0, 0, i, 12)[1])
        for i, (sample, budget) in enumerate(zip(samples(), BUDGETS, strict=True))
    ]


def make_sampler(tiny_model, architecture, micro_batch_size=8, **options):
    folder = tiny_model(architecture)
    return Sampler(make_policy(folder, **options), load_tokenizer(Model(path=str(folder))), CLOSE, micro_batch_size)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("micro_batch_size", [8, 2, 1])
def test_sampled_logprobs_and_values_equal_teacher_forced_ones(tiny_model, architecture, micro_batch_size):
    sampler = make_sampler(tiny_model, architecture, micro_batch_size)
    asked = requests()
    responses = sampler.sample(asked)
    rows = [Sample(q.prompt, r.tokens) for q, r in zip(asked, responses, strict=True)]
    with torch.no_grad(), sampler.policy.role("actor"):
        out = sampler.policy(pack(rows))
    torch.testing.assert_close(torch.cat([r.logprobs for r in responses]), out["logprobs"], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(torch.cat([r.values for r in responses]), out["values"], atol=5e-5, rtol=1e-4)
    for request, response in zip(asked, responses, strict=True):
        assert 1 <= len(response.tokens) <= request.budget
        ended = response.tokens[-1] in sampler.eos or CLOSE in response.text
        assert ended or len(response.tokens) == request.budget


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_do_not_depend_on_the_batch(tiny_model, architecture):
    """Alone, in another order, in other packs, or with ranks in fixed_decode_steps: a row's response is its own."""
    sampler = make_sampler(tiny_model, architecture)
    asked = requests()
    together = [r.tokens for r in sampler.sample(asked)]
    assert [sampler.sample([request])[0].tokens for request in asked] == together
    assert [r.tokens for r in sampler.sample(asked[::-1])][::-1] == together
    sampler.micro_batch_size = 2
    assert [r.tokens for r in sampler.sample(asked)] == together
    sampler.fixed_decode_steps = 14
    assert [r.tokens for r in sampler.sample(asked)] == together


def test_a_row_stops_at_the_closing_tag(tiny_model, monkeypatch):
    """The model is made to write a fixed text; what follows the tag is never sampled."""
    sampler = make_sampler(tiny_model, "llama")
    script = sampler.tokenizer(f"Yes{CLOSE} and more", add_special_tokens=False)["input_ids"]
    steps = iter(range(100))

    def scripted(states):
        logits = torch.full((len(states), sampler.policy.causal_lm.config.vocab_size), -1e9)
        logits[:, script[next(steps)]] = 0.0
        return logits

    monkeypatch.setattr(sampler.policy, "logits", scripted)
    asked = [GenerationRequest(s.prompt, 30, np.full(30, 0.5)) for s in samples()]
    for response in sampler.sample(asked):
        assert response.text.endswith(CLOSE) or response.text.split(CLOSE)[1].strip() == ""
        assert response.text.startswith("Yes") and "more" not in response.text
        torch.testing.assert_close(response.logprobs, torch.zeros(len(response.tokens)))


def test_end_of_sequence_ends_a_row(tiny_model, monkeypatch):
    sampler = make_sampler(tiny_model, "llama")
    eos = sampler.tokenizer.eos_token_id

    def always_eos(states):
        logits = torch.full((len(states), sampler.policy.causal_lm.config.vocab_size), -1e9)
        logits[:, eos] = 0.0
        return logits

    monkeypatch.setattr(sampler.policy, "logits", always_eos)
    assert [r.tokens for r in sampler.sample(requests())] == [[eos]] * len(BUDGETS)


def test_temperature_scales_sampling_and_logprobs_alike(tiny_model):
    sampler = make_sampler(tiny_model, "llama")
    sampler.policy.temperature = 0.5
    asked = requests()
    responses = sampler.sample(asked)
    rows = [Sample(q.prompt, r.tokens) for q, r in zip(asked, responses, strict=True)]
    with torch.no_grad(), sampler.policy.role("actor"):
        torch.testing.assert_close(
            torch.cat([r.logprobs for r in responses]), sampler.policy(pack(rows))["logprobs"], atol=5e-5, rtol=1e-4
        )


def test_dropout_is_off_while_sampling(tiny_model):
    sampler = make_sampler(tiny_model, "llama", dropout=0.5)
    sampler.policy.train()
    first = [r.tokens for r in sampler.sample(requests())]
    assert [r.tokens for r in sampler.sample(requests())] == first


def test_random_numbers_of_rows_are_independent_streams():
    seen = {}
    for key in [(s, p, t, r) for s in (0, 1) for p in (0, 1) for t in (0, 1, 7) for r in (0, 1, 15)]:
        draw, uniforms = random_numbers(*key, 8)
        again = random_numbers(*key, 8)
        assert again[0] == draw and np.array_equal(again[1], uniforms)
        assert 0 <= draw < 1 and (uniforms >= 0).all() and (uniforms < 1).all()
        seen[key] = tuple(uniforms)
    assert len(set(seen.values())) == len(seen)
    philox = np.random.Philox(key=[3, 0], counter=[0, 0, 5, 9])  # training: the task is no part of it
    assert random_numbers(3, 0, 9, 5, 8)[1].tolist() == np.random.Generator(philox).random(9)[1:].tolist()
    budgets = [12 + int(random_numbers(0, 0, step, row, 32)[0] * 21) for step in range(200) for row in range(16)]
    assert set(budgets) == set(range(12, 33))  # uniform over 12 to 32
    assert abs(np.mean(budgets) - 22) < 5 * np.std(budgets) / len(budgets) ** 0.5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("micro_batch_size", [8, 3])
def test_rows_that_share_passages_are_sampled_as_if_alone(tiny_model, architecture, micro_batch_size):
    sampler = make_sampler(tiny_model, architecture, micro_batch_size)
    budgets = (12, 3, 9, 5, 12, 7, 10)  # rows finish at different steps
    asked = [
        GenerationRequest(prompt, budget, random_numbers(0, 0, 0, i, 12)[1])
        for i, (prompt, budget) in enumerate(zip(nested_prompts(), budgets, strict=True))
    ]
    responses = sampler.sample(asked)
    assert [sampler.sample([request])[0].tokens for request in asked] == [r.tokens for r in responses]
    rows = [Sample(q.prompt, r.tokens) for q, r in zip(asked, responses, strict=True)]
    with torch.no_grad(), sampler.policy.role("actor"):
        forced = torch.cat([sampler.policy(pack([row]))["logprobs"] for row in rows])
    torch.testing.assert_close(torch.cat([r.logprobs for r in responses]), forced, atol=2e-5, rtol=1e-4)


def test_shared_prefixes_are_cached_once(tiny_model):
    policy = make_policy(tiny_model("llama")).eval()
    with torch.no_grad(), policy.role("actor"):
        decoder = TreeDecoder(policy, nested_prompts(), 8, 12)
    assert sorted(group.rows for group in decoder.groups) == [1, 2, 4]
    keys, _ = decoder.own[0]
    assert keys.shape[2] == 9 + 12, "the longest rest of a prompt, and the new tokens"
    decoder.keep(torch.tensor([2, 5]))
    assert len(decoder.order) == 2 and sum(group.rows for group in decoder.groups) == 2
