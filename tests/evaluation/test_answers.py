"""Answers of an evaluation: independence of batches, the response budget, probabilities of ranked answers."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import forms_of, make_policy, predict

from extensions.data import Example
from extensions.evaluation.metrics import score
from extensions.model.loading import load_tokenizer
from extensions.prompts import CLOSE, PromptEncoder, parse_answer, prompt_text, surface_forms
from extensions.recipe import Model
from extensions.rollout.sampler import Response, Sampler
from extensions.tasks import TASKS, Task

COLA, SST2, STSB, MULTIRC, RECORD = (TASKS[name] for name in ("cola", "sst2", "stsb", "multirc", "record"))
# Like ReCoRD, but with three answers, of which the positive one is neither first nor last.
RANKED = Task.model_validate(
    {
        "name": "ranked",
        "description": "-",
        "question": "{text}: {name}?",
        "labels": {"no": ["No", "Wrong"], "yes": ["Yes", "Right"], "maybe": ["Unsure"]},
        "positive": "yes",
        "metrics": ["squad_f1", "squad_em"],
        "group_by": ["query"],
        "source": {"keep": {"query": "query", "entity": "entity", "answers": "answers"}},
    }
)


class FakeEncoder:
    def encode(self, task, fields):
        text = " ".join(fields.values())
        return list(text.encode()), text

    def answer_ids(self, ids, text, answer):
        assert bytes(ids).decode() == text
        return list(answer.encode())

    def surface_ids(self, ids, text, answer):
        return [self.answer_ids(ids, text, form) for form in surface_forms(answer)]


class FakeSampler:
    """As in the real sampler, an answer is a function of the row's own prompt and random numbers."""

    def __init__(self):
        self.calls = []

    def sample(self, requests, greedy=False):
        self.calls.append(requests)
        answers = []
        for request in requests:
            draw = float(request.uniforms[0])
            text = ("Yes", "No", "Positive", f"{5 * draw:.2f}")[int(1000 * draw + len(request.prompt)) % 4]
            answers.append(Response([1], torch.zeros(1), torch.zeros(1), text + CLOSE * (draw < 0.9)))
        return answers

    def logprobs(self, samples, together=1, counted=None):
        return torch.tensor([-((3 * sum(s.prompt) + sum(s.response)) % 17) / 4 for s in samples])


def rows_of(task, count=17):
    rng = random.Random(0)
    label = "2.5" if task.is_regression else next(iter(task.labels))
    return [
        Example(
            task,
            i,
            {
                field: f"{field} {i % 3}" if task.group_by else f"{i:02}" + "x" * rng.randint(1, 30)
                for field in task.fields
            },
            label,
            None,
            {name: 10 * i for name in task.source.keep},
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("task", [COLA, STSB, SST2, MULTIRC], ids=lambda task: task.name)
def test_predictions_do_not_depend_on_the_batches(task):
    examples = rows_of(task)
    whole = predict(examples, FakeEncoder(), FakeSampler(), 100, 32, seed=7)
    assert [(p.task, p.index, p.gold, p.kept) for p in whole] == [
        (task.name, e.index, e.label, e.kept) for e in examples
    ]
    assert [p.answer for p in whole] == [parse_answer(p.response, task) for p in whole]
    assert len({p.response for p in whole}) > 3
    for batch_size in (1, 2, 5, 16):
        sampler = FakeSampler()
        assert predict(examples, FakeEncoder(), sampler, batch_size, 32, 7) == whole
        sizes = [len(call) for call in sampler.calls]
        assert sum(sizes) == len(examples) and max(sizes) <= batch_size
    shuffled = random.Random(1).sample(examples, len(examples))
    again = predict(shuffled[:10], FakeEncoder(), FakeSampler(), 4, 32, 7)
    assert again == [whole[e.index] for e in shuffled[:10]], "another rank's rows get the same answers"
    assert predict(examples, FakeEncoder(), FakeSampler(), 100, 32, seed=8) != whole


def test_random_numbers_of_an_evaluation_depend_on_the_task():
    """sha256 of the name, as `printf cola | sha256sum` prints it, is a word of Philox's counter."""
    for task, word in ((COLA, 0x42BE22C266603B34), (SST2, 0xEB83A0472E4A7A0D)):
        sampler = FakeSampler()
        predict(rows_of(task), FakeEncoder(), sampler, 100, 4, seed=7)
        counters = [np.array([0, word, row, 0], dtype=np.uint64) for row in range(len(rows_of(task)))]
        expected = {tuple(np.random.Generator(np.random.Philox(key=[7, 1], counter=c)).random(5)[1:]) for c in counters}
        assert {tuple(request.uniforms) for request in sampler.calls[0]} == expected


def test_evaluation_uses_the_upper_bound_of_the_budget():
    for task in (COLA, SST2):
        sampler = FakeSampler()
        predict(rows_of(task), FakeEncoder(), sampler, 5, 32, seed=0)
        requests = [request for call in sampler.calls for request in call]
        assert {request.budget for request in requests} == {32}
        assert all(len(request.uniforms) >= 32 for request in requests)
        lengths = [len(request.prompt) for request in requests]
        assert lengths == sorted(lengths), "rows of similar length are sampled together"


def test_rows_with_the_same_long_text_are_sampled_together():
    passages = ["one", "two", "alone", "one", "two", "one"]
    examples = [
        Example(MULTIRC, i, {"passage": passage, "question": f"q{i}", "answer": "a" * (7 - i)}, "1")
        for i, passage in enumerate(passages)
    ]
    sampler = FakeSampler()
    predict(examples, FakeEncoder(), sampler, 100, 4, seed=0)
    order = [bytes(request.prompt).decode().split()[0] for request in sampler.calls[0]]
    assert len(set(order)) == 3
    assert all(order[i] == order[i - 1] for i in range(1, 6) if order[i] in order[:i])


def test_only_a_ranked_task_computes_probabilities():
    sampler = FakeSampler()
    sampler.logprobs = lambda *_: pytest.fail("no candidates here")
    for task in (COLA, STSB, MULTIRC):
        assert [p.positive_probability for p in predict(rows_of(task), FakeEncoder(), sampler, 8, 4, seed=0)] == [
            None
        ] * 17


PASSAGES = [
    "Mary wrote a letter to the teacher last week. Anna and Bob were happy.",
    "Mary wrote a letter to the teacher last week. Nobody slept in Rome.",
    "The children were happy, and nobody slept. Oslo is far from here.",
]


def ranked_examples(task):
    """Two queries about the first passage, one about the second, and a single candidate of the third."""
    wrong = {"record": "false", "ranked": "no"}[task.name]
    queries = [(0, ["Anna", "Bob", "Mary"]), (0, ["Bob", "Anna"]), (1, ["Mary", "Rome"]), (2, ["Oslo"])]
    found = []
    for query, (passage, entities) in enumerate(queries):
        for entity in entities:
            fields = {"passage": PASSAGES[passage], "statement": f"In week {query} {entity} wrote."}
            if task is RANKED:
                fields = {"text": PASSAGES[passage], "name": entity}
            label = task.positive if entity == entities[0] else wrong
            kept = {"passage": passage, "query": query, "entity": entity, "answers": entities[:1]}
            found.append(Example(task, len(found), fields, label, None, kept))
    return found


def real_sampler(tiny_model, micro_batch_size=8, temperature=1.0):
    folder = tiny_model("llama")
    sampler = Sampler(make_policy(folder), load_tokenizer(Model(path=str(folder))), CLOSE, micro_batch_size)
    sampler.policy.temperature = temperature
    return sampler


def plain_positive_probability(sampler, task, text, temperature=1.0):
    """Probability of the positive answer, by one plain forward of the whole text per form of an answer."""
    prompt = sampler.tokenizer(text)["input_ids"]
    probabilities = {}
    for label, words in task.labels.items():
        probabilities[label] = 0.0
        for form in forms_of(words):
            ids = sampler.tokenizer(f"{text}{form}")["input_ids"]
            assert ids[: len(prompt)] == prompt
            with torch.no_grad(), sampler.policy.role("actor"):
                logits = sampler.policy.lm.base_model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            logprobs = (logits.double() / temperature).log_softmax(dim=-1)
            probabilities[label] += sum(logprobs[k - 1, ids[k]] for k in range(len(prompt), len(ids))).exp().item()
    return probabilities[task.positive] / sum(probabilities.values())


@pytest.mark.parametrize("task", [RECORD, RANKED], ids=lambda task: task.name)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_positive_probability_is_the_softmax_of_the_answers_logprobs(tiny_model, task, temperature):
    examples, sampler = ranked_examples(task), real_sampler(tiny_model, 3, temperature)
    found = predict(examples, PromptEncoder(sampler.tokenizer, 500, False), sampler, 4, 5, seed=0)
    positive_probabilities = [p.positive_probability for p in found]
    expected = [plain_positive_probability(sampler, task, prompt_text(task, e.fields), temperature) for e in examples]
    assert positive_probabilities == pytest.approx(expected, rel=2e-5)
    assert max(positive_probabilities) > 1.005 * min(positive_probabilities), "the candidates differ"


@pytest.mark.parametrize("task", [RECORD, RANKED], ids=lambda task: task.name)
def test_answers_and_probabilities_do_not_depend_on_batches_or_shared_texts(tiny_model, task):
    examples, sampler = ranked_examples(task), real_sampler(tiny_model)
    encoder = PromptEncoder(sampler.tokenizer, 500, False)
    alone = [prediction for example in examples for prediction in predict([example], encoder, sampler, 1, 8, seed=3)]
    assert len({p.positive_probability for p in alone}) > 3
    for micro_batch_size, batch_size in [(8, 100), (8, 3), (1, 5), (3, 2)]:
        sampler.micro_batch_size = micro_batch_size
        found = predict(examples, encoder, sampler, batch_size, 8, seed=3)
        assert [(p.index, p.response, p.answer, p.gold, p.kept) for p in found] == [
            (p.index, p.response, p.answer, p.gold, p.kept) for p in alone
        ]
        assert [p.positive_probability for p in found] == pytest.approx(
            [p.positive_probability for p in alone], rel=2e-5
        )


@pytest.mark.parametrize("decoding", ["sample", "greedy", "likelihood"])
def test_a_ranked_task_generates_nothing(tiny_model, decoding):
    examples, sampler = ranked_examples(RANKED), real_sampler(tiny_model)
    sampler.sample = lambda *_, **__: pytest.fail("its metrics compare likelihoods")
    found = predict(examples, PromptEncoder(sampler.tokenizer, 500, False), sampler, 4, 5, seed=0, decoding=decoding)
    for prediction in found:
        assert prediction.answer == max(prediction.probabilities, key=prediction.probabilities.get)
        assert parse_answer(prediction.response, RANKED) == prediction.answer
    assert score(RANKED, found)["format_error_rate"] is None, "no format was tested"


def test_positive_probability_of_a_truncated_prompt(tiny_model):
    sampler, limit = real_sampler(tiny_model), 300
    encoder = PromptEncoder(sampler.tokenizer, limit, False)
    examples = [
        replace(example, fields=example.fields | {"passage": example.fields["passage"] + " Nobody slept." * 90})
        for example in ranked_examples(RECORD)
    ]
    found = predict(examples, encoder, sampler, 4, 5, seed=0)
    prompts = [encoder.encode(RECORD, example.fields) for example in examples]
    assert all(limit - 20 < len(ids) <= limit for ids, _ in prompts), "all are truncated"
    expected = [plain_positive_probability(sampler, RECORD, text) for _, text in prompts]
    assert [p.positive_probability for p in found] == pytest.approx(expected, rel=2e-5)
