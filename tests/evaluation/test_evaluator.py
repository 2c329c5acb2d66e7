"""Rows of an evaluation, sampling that does not depend on batches, and the run folder."""

import random
from dataclasses import replace

import pytest
import torch
import yaml
from support import make_policy, predict

from extensions.common.errors import UserError
from extensions.common.files import read_json, read_jsonl, write_json
from extensions.common.versions import versions
from extensions.data import Example, by_question, subsample_evenly
from extensions.data.sampling import sample_candidate_pair
from extensions.model.loading import load_tokenizer
from extensions.prompts import CLOSE, PromptEncoder, parse_answer, prompt_text
from extensions.recipe import Model, Recipe
from extensions.rollout.sampler import Response, Sampler
from extensions.runs.checkpoint import checkpoint_folders
from extensions.runs.folder import RunFolder
from extensions.tasks import TASKS, Task

COLA, SST2, STSB, MULTIRC, RECORD, AXG = (TASKS[name] for name in ("cola", "sst2", "stsb", "multirc", "record", "axg"))
# As ReCoRD, with three answers, of which the positive one is neither first nor last.
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


# -------------------------------------------------------------------------------------------------- rows and questions


def questions(task, sizes, first=0):
    """Examples of questions with `sizes` rows, one question after the other."""
    rows = [unit for unit, size in enumerate(sizes) for _ in range(size)]
    return [
        Example(
            task,
            first + i,
            {},
            None,
            None,
            {**dict.fromkeys(task.source.keep, i), **dict.fromkeys(task.group_by, unit)},
        )
        for i, unit in enumerate(rows)
    ]


def indices(found):
    return [[example.index for example in unit] for unit in found]


def test_units():
    rows = questions(COLA, [1] * 3)
    assert by_question(rows) == [[row] for row in rows]
    assert indices(by_question(questions(MULTIRC, [2, 1, 3]))) == [[0, 1], [2], [3, 4, 5]]
    # A question number is of its paragraph; a question's rows need not stand together; numbers may be text.
    places = [(1, 0), (0, 0), (1, 0), (0, 1), ("0", "0"), (1, 1)]
    rows = [Example(MULTIRC, i, {}, "1", None, {"paragraph": p, "question": q}) for i, (p, q) in enumerate(places)]
    assert indices(by_question(rows)) == [[0, 2], [1, 4], [3], [5]]
    # Row 0 of a task is not row 0 of another, nor is pair 0 query 0.
    mixed = [*questions(COLA, [1]), *questions(SST2, [1]), *questions(AXG, [2]), *questions(RECORD, [2])]
    assert [len(unit) for unit in by_question(mixed)] == [1, 1, 2, 2]


def test_spread():
    rows = questions(COLA, [1] * 10)
    assert subsample_evenly(rows, None) == subsample_evenly(rows, 10) == subsample_evenly(rows, 99) == rows
    assert [row.index for row in subsample_evenly(rows, 5)] == [0, 2, 4, 6, 8]
    assert [row.index for row in subsample_evenly(rows, 3)] == [0, 3, 6]
    many = questions(COLA, [1] * 1043)
    assert len({row.index for row in subsample_evenly(many, 200)}) == 200


def test_spread_keeps_questions_whole():
    rows = questions(AXG, [2] * 10)
    assert [row.index for row in subsample_evenly(rows, 10)] == [0, 1, 4, 5, 8, 9, 12, 13, 16, 17]
    assert [row.index for row in subsample_evenly(rows, 7)] == [0, 1, 6, 7, 12, 13], "three pairs fit in seven rows"
    assert [row.index for row in subsample_evenly(rows, 1)] == [0, 1], "at least one"
    # Rows of a question that do not stand together come together.
    rows = [Example(AXG, i, {}, None, None, {"pair": i % 3}) for i in range(6)]
    assert [row.index for row in subsample_evenly(rows, 4)] == [0, 3, 1, 4]


@pytest.mark.parametrize("task", [MULTIRC, RECORD], ids=lambda task: task.name)
@pytest.mark.parametrize("limit", [1, 60, 200, 500, 1500])
def test_spread_takes_about_as_many_rows_as_wanted(task, limit):
    rng = random.Random(limit)
    rows = questions(task, [rng.randint(2, 8) for _ in range(400)])
    found = subsample_evenly(rows, limit)
    whole = {unit[0].index: unit for unit in by_question(rows)}
    assert [row for unit in by_question(found) for row in unit] == found
    assert all(unit == whole[unit[0].index] for unit in by_question(found))
    assert [row.index for row in found] == sorted({row.index for row in found})
    taken = len(by_question(found))
    assert taken == max(1, limit * 400 // len(rows))
    # A question's rows are 5 on average, with a deviation of 2; one question may be missing for want of room.
    assert abs(len(found) - limit) <= 8 + 3 * 2 * taken**0.5
    firsts = [row.kept[task.group_by[0]] for row in found]
    assert firsts[0] == 0 and firsts[-1] == (taken - 1) * 400 // taken, "from the whole file"


def queries(count=20):
    """Five candidates a query, of which one or two are right, anywhere among them."""
    rng = random.Random(0)
    rows = []
    for query in range(count):
        right = rng.sample(range(5), rng.randint(1, 2))
        for k in range(5):
            kept = {"passage": query // 2, "query": query, "entity": f"E{k}", "answers": ["E"]}
            label = "true" if k in right else "false"
            rows.append(Example(RECORD, len(rows), {"statement": f"{query} {k}"}, label, None, kept))
    return rows


def test_a_training_query_keeps_one_right_and_one_wrong_candidate():
    rows = queries()
    found = sample_candidate_pair(rows, seed=0)
    assert sample_candidate_pair(queries(), seed=0) == found
    assert [example.index for example in found] == list(range(40))
    by_statement = {row.fields["statement"]: row for row in rows}
    for k in range(20):
        pair = found[2 * k : 2 * k + 2]
        assert {example.label for example in pair} == {"true", "false"}
        assert {example.kept["query"] for example in pair} == {k}
        for example in pair:
            was = by_statement[example.fields["statement"]]
            assert (example.task, example.label, example.kept) == (was.task, was.label, was.kept)
    pairs = [example.pair for example in found]
    assert None not in pairs and pairs[::2] == pairs[1::2] and len(set(pairs)) == 20
    assert sample_candidate_pair(rows[:50], seed=0) == found[:20], "a query's choice is its own"


def test_another_seed_keeps_other_candidates():
    chosen = [{example.fields["statement"] for example in sample_candidate_pair(queries(), seed)} for seed in range(30)]
    assert len(set(map(frozenset, chosen))) == 30
    assert set().union(*chosen) == {row.fields["statement"] for row in queries()}, "each candidate has its chance"


def test_a_query_without_a_wrong_candidate_keeps_what_it_has():
    rows = [row for row in queries(3) if row.kept["query"] != 1 or row.label == "true"]
    found = sample_candidate_pair(rows, seed=0)
    assert [example.kept["query"] for example in found] == [0, 0, 1, 2, 2]
    assert [example.index for example in found] == [0, 1, 2, 3, 4]


# --------------------------------------------------------------------------------------------------------- predict


class FakeEncoder:
    def encode(self, task, fields):
        text = " ".join(fields.values())
        return list(text.encode()), text

    def answer_ids(self, ids, text, answer):
        assert bytes(ids).decode() == text
        return list(answer.encode())


class FakeSampler:
    """The answer is a function of the row's own prompt and random numbers, as the real sampler's is."""

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

    def logprobs(self, samples, together=1):
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


@pytest.mark.parametrize("task", [COLA, STSB, SST2, MULTIRC, RECORD], ids=lambda task: task.name)
def test_predictions_do_not_depend_on_the_batches(task):
    examples = rows_of(task)
    whole = predict(examples, FakeEncoder(), FakeSampler(), 100, 32, seed=7)
    assert [(p.task, p.index, p.gold, p.kept) for p in whole] == [
        (task.name, e.index, e.label, e.kept) for e in examples
    ]
    assert [p.answer for p in whole] == [parse_answer(p.text, task) for p in whole]
    assert len({p.text for p in whole}) > 3
    for batch_size in (1, 2, 5, 16):
        sampler = FakeSampler()
        assert predict(examples, FakeEncoder(), sampler, batch_size, 32, 7) == whole
        sizes = [len(call) for call in sampler.calls]
        assert sum(sizes) == len(examples) and max(sizes) <= batch_size
    shuffled = random.Random(1).sample(examples, len(examples))
    again = predict(shuffled[:10], FakeEncoder(), FakeSampler(), 4, 32, 7)
    assert again == [whole[e.index] for e in shuffled[:10]], "another rank's share gives the same"
    assert predict(examples, FakeEncoder(), FakeSampler(), 100, 32, seed=8) != whole


def test_evaluation_uses_the_upper_bound_of_the_budget():
    for task in (COLA, SST2):
        sampler = FakeSampler()
        predict(rows_of(task), FakeEncoder(), sampler, 5, 32, seed=0)
        requests = [request for call in sampler.calls for request in call]
        assert {request.budget for request in requests} == {32}
        assert all(len(request.uniforms) >= 32 for request in requests)
        lengths = [len(request.prompt) for request in requests]
        assert lengths == sorted(lengths), "rows of like length are sampled together"


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


def test_only_a_ranked_task_asks_for_support():
    sampler = FakeSampler()
    sampler.logprobs = lambda samples, together: pytest.fail("no candidates here")
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
    """Two queries about the first passage, one about the second, and a lone candidate of the third."""
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


def plain_support(sampler, task, text, temperature=1.0):
    """Share of the positive answer, by plain forwards, one for each answer, of the whole text."""
    prompt = sampler.tokenizer(text)["input_ids"]
    probabilities = {}
    for label, (word, *_) in task.labels.items():
        ids = sampler.tokenizer(f"{text}{word}{CLOSE}")["input_ids"]
        assert ids[: len(prompt)] == prompt
        with torch.no_grad(), sampler.policy.role("actor"):
            logits = sampler.policy.lm.base_model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        logprobs = (logits.double() / temperature).log_softmax(dim=-1)
        probabilities[label] = sum(logprobs[k - 1, ids[k]] for k in range(len(prompt), len(ids))).exp().item()
    return probabilities[task.positive] / sum(probabilities.values())


@pytest.mark.parametrize("task", [RECORD, RANKED], ids=lambda task: task.name)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_support_is_the_softmax_of_the_answers_logprobs(tiny_model, task, temperature):
    examples, sampler = ranked_examples(task), real_sampler(tiny_model, 3, temperature)
    found = predict(examples, PromptEncoder(sampler.tokenizer, 500, False), sampler, 4, 5, seed=0)
    positive_probabilities = [p.positive_probability for p in found]
    expected = [plain_support(sampler, task, prompt_text(task, e.fields), temperature) for e in examples]
    assert positive_probabilities == pytest.approx(expected, rel=2e-5)
    assert max(positive_probabilities) > 1.005 * min(positive_probabilities), "the candidates differ"


@pytest.mark.parametrize("task", [RECORD, RANKED], ids=lambda task: task.name)
def test_support_and_answers_do_not_depend_on_batches_or_common_texts(tiny_model, task):
    examples, sampler = ranked_examples(task), real_sampler(tiny_model)
    encoder = PromptEncoder(sampler.tokenizer, 500, False)
    alone = [prediction for example in examples for prediction in predict([example], encoder, sampler, 1, 8, seed=3)]
    assert len({p.text for p in alone}) > 3
    for micro_batch_size, batch_size in [(8, 100), (8, 3), (1, 5), (3, 2)]:
        sampler.micro_batch_size = micro_batch_size
        found = predict(examples, encoder, sampler, batch_size, 8, seed=3)
        assert [(p.index, p.text, p.answer, p.gold, p.kept) for p in found] == [
            (p.index, p.text, p.answer, p.gold, p.kept) for p in alone
        ]
        assert [p.positive_probability for p in found] == pytest.approx(
            [p.positive_probability for p in alone], rel=2e-5
        )


def test_support_of_a_shortened_prompt(tiny_model):
    sampler, limit = real_sampler(tiny_model), 300
    encoder = PromptEncoder(sampler.tokenizer, limit, False)
    examples = [
        replace(example, fields=example.fields | {"passage": example.fields["passage"] + " Nobody slept." * 90})
        for example in ranked_examples(RECORD)
    ]
    found = predict(examples, encoder, sampler, 4, 5, seed=0)
    prompts = [encoder.encode(RECORD, example.fields) for example in examples]
    assert all(limit - 20 < len(ids) <= limit for ids, _ in prompts), "shortened, all of them"
    expected = [plain_support(sampler, RECORD, text) for _, text in prompts]
    assert [p.positive_probability for p in found] == pytest.approx(expected, rel=2e-5)


# ------------------------------------------------------------------------------------------------------ run folder


def recipe_of(**keys):
    return Recipe.model_validate({"name": "trial", "model": {"path": "some/model"}, "data": {"tasks": ["cola"]}} | keys)


def unfinished(root, recipe, steps=(2, 4)):
    run = RunFolder(root, recipe, {})
    run.append("metrics.jsonl", [{"step": k, "reward_mean": 0.1 * k} for k in range(1, 7)])
    run.append("rollouts.jsonl", [{"step": k, "text": "line\u2028 “Yes”"} for k in range(1, 7)])
    run.close()
    for step in steps:
        (root / "checkpoints" / f"step-{step}").mkdir(parents=True)
    return root


def test_a_new_folder(tmp_path):
    root = tmp_path / "deep" / "run"
    run = RunFolder(root, recipe_of(), {})
    assert run.set_aside is None
    assert Recipe.model_validate(yaml.safe_load((root / "recipe.yaml").read_text())) == recipe_of()
    assert read_json(root / "versions.json")["packages"]["torch"] == versions()["packages"]["torch"]
    run.metrics({"step": 1, "loss": float("nan"), "nested": {"kl": float("inf"), "rate": 0.5}, "text": "“é”"})
    run.close()
    expected = {"step": 1, "loss": None, "nested": {"kl": None, "rate": 0.5}, "text": "“é”"}
    assert read_jsonl(root / "metrics.jsonl") == [expected]


def test_a_finished_run_is_set_aside(tmp_path):
    root = unfinished(tmp_path / "run", recipe_of())
    write_json(root / "eval.json", {"before": {}, "after": {}})
    for number in (1, 2):
        run = RunFolder(root, recipe_of(seed=number), {})
        assert run.set_aside == tmp_path / f"run.old{number}"
        assert (run.set_aside / "recipe.yaml").exists() and not (root / "eval.json").exists()
        write_json(root / "eval.json", {"after": {}})
    assert (tmp_path / "run.old1" / "metrics.jsonl").exists()


def test_a_run_without_checkpoint_is_set_aside(tmp_path):
    root = unfinished(tmp_path / "run", recipe_of(), steps=())
    assert RunFolder(root, recipe_of(), {}).set_aside == tmp_path / "run.old1"


def test_an_unfinished_run_goes_on(tmp_path):
    root = unfinished(tmp_path / "run", recipe_of())
    write_json(root / "eval.json", {"before": {}})
    run = RunFolder(root, recipe_of(), {})
    assert run.set_aside is None and checkpoint_folders(root)[-1].name == "step-4"
    run.cut_back(4, 4)
    assert [record["step"] for record in read_jsonl(root / "metrics.jsonl")] == [1, 2, 3, 4]
    assert read_jsonl(root / "rollouts.jsonl")[-1] == {"step": 4, "text": "line\u2028 “Yes”"}
    run.append("metrics.jsonl", [{"step": 5}])
    run.close()
    assert [record["step"] for record in read_jsonl(root / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_an_unfinished_run_refuses_another_recipe(tmp_path):
    root = unfinished(tmp_path / "run", recipe_of())
    with pytest.raises(UserError) as caught:
        RunFolder(root, recipe_of(seed=3, ppo={"epochs": 2}), {})
    for part in ("another recipe", "output_dir", "seed: was 0, is 3", "ppo.epochs: was 4, is 2"):
        assert part in str(caught.value)
    assert "lora" not in str(caught.value)
    assert RunFolder(root, recipe_of(output_dir=str(root)), {}).set_aside is None, "the folder may be named another way"


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
    root = unfinished(tmp_path / "run", recipe_of())
    with (root / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "rew')
    assert [record["step"] for record in read_jsonl(root / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    RunFolder(root, recipe_of(), {}).cut_back(6, 6)
    assert (root / "metrics.jsonl").read_text().endswith("\n")


def test_a_recipe_cut_by_a_kill_is_a_plain_error(tmp_path):
    root = unfinished(tmp_path / "run", recipe_of())
    (root / "recipe.yaml").write_text("")
    with pytest.raises(UserError, match=r"recipe\.yaml is damaged.*output_dir"):
        RunFolder(root, recipe_of(), {})


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output_dir: cannot write to"):
        RunFolder(tmp_path / "file", recipe_of(), {})
    with pytest.raises(UserError, match="output_dir: cannot write to"):
        RunFolder(tmp_path / "file" / "below", recipe_of(), {})


def test_checkpoints_are_ordered_by_number(tmp_path):
    for name in ("step-9", "step-10", "step-100", "step-20", "writing-101", "damaged-step-102", "step-x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step-9", "step-10", "step-20", "step-100"]
    assert checkpoint_folders(tmp_path / "none") == []
