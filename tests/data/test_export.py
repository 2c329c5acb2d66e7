"""Exported prompt sets, read and rewarded by OpenRLHF's own code."""

import asyncio
import json
from types import SimpleNamespace

import datasets
import pytest
import yaml
from transformers import AutoTokenizer

from extensions.common.errors import UserError
from extensions.data import load_examples
from extensions.data.openrlhf_export import export
from extensions.distributed.openrlhf import openrlhf_importable
from extensions.model.loading import load_config, prompt_limit
from extensions.prompts import CLOSE, PromptEncoder, unpack_label
from extensions.recipe import load_recipe
from extensions.rollout.rewards import BUILT_IN, load_reward
from extensions.tasks import TASKS

with openrlhf_importable():
    from openrlhf.datasets.prompts_dataset import PromptDataset
    from openrlhf.datasets.utils import blending_datasets
    from openrlhf.utils.agent import SingleTurnAgentExecutor

HARD = 'He said "<image> {sentence} {0}" \\n %s, naïvely: \U0001f600 \u2028 [x] 2024-01-01'
COLA = f"gj04\t1\t\tThe sailors rode.\ngj04\t0\t*\tThe sailors ride breeze.\ngj04\t1\t\t{HARD}\n"
STSB_HEADER = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
STSB = f"{STSB_HEADER}\tscore\n0\tnews\tMSRpar\t2015\t7\ta\tb\tAnna slept.\tShe slept.\t3.800\n"
OWN = {
    "name": "own",
    "description": "Judge.",
    "question": 'Judge "{text}".',
    "labels": {"a": ["Good"], "b": ["Bad"]},
    "source": {"files": {"train": "own.jsonl"}},
}
STORY = "Anna met Bill in Bonn."
RECORD = {
    "passage": {"text": STORY, "entities": [{"start": 0, "end": 3}, {"start": 9, "end": 12}, {"start": 17, "end": 20}]},
    "qas": [{"query": "@placeholder met Bill", "idx": 0, "answers": [{"start": 0, "end": 3, "text": "Anna"}]}],
    "idx": 0,
}
FILES = {
    "CoLA/train.tsv": COLA,
    "CoLA/dev.tsv": COLA,
    "CoLA/test.tsv": "index\tsentence\n0\tBill whistled.\n",
    "STS-B/train.tsv": STSB,
    "AX-b/AX-b.jsonl": '{"idx": "0", "label": "not_entailment", "sentence1": "A.", "sentence2": "B."}\n',
    "ReCoRD/train.jsonl": json.dumps(RECORD) + "\n",
    "own.jsonl": "".join(
        json.dumps({"text": text, "label": label}) + "\n" for text, label in ((HARD, "a"), ("x", "b"))
    ),
}
EXPECTED = {
    "cola/train.jsonl": ["1", "0", "1"],
    "cola/validation.jsonl": ["1", "0", "1"],
    "stsb/train.jsonl": ["3.800"],
    "axb/test.jsonl": ["not_entailment"],
    "record/train.jsonl": ["true", "false"],
    "own/train.jsonl": ["a", "b"],
}


@pytest.fixture
def make(tmp_path, tiny_model):
    """A recipe over the files above."""
    for name, content in FILES.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(content, encoding="utf-8")

    def recipe(*tasks, **keys):
        raw = {
            "name": "trial",
            "model": {"path": str(tiny_model("llama"))},
            "data": {"tasks": list(tasks), "root": str(tmp_path / "data")},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(raw))
        return load_recipe(path, [f"{key}={value}" for key, value in keys.items()])

    return recipe


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model("llama"))


def exported(recipe, tokenizer, folder):
    """Relative names of the files in `folder`, in writing order."""
    encoder = PromptEncoder(tokenizer, prompt_limit(recipe, load_config(recipe.model)), recipe.prompt.chat_template)
    warnings = []
    written = export(recipe, encoder, folder, warnings.append)
    assert {path: len(lines(path)) for path in written} == written
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted(written)
    return [path.relative_to(folder).as_posix() for path in written]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]


@pytest.fixture
def openrlhf_reads(monkeypatch, tmp_path, tokenizer):
    """Prompt sets as `openrlhf.cli.train_ppo_ray` reads them, with the options that `export` names."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = SimpleNamespace(input_key="input", label_key="label", apply_chat_template=False)
    strategy = SimpleNamespace(args=SimpleNamespace(data=data), print=lambda *text: None, is_rank_0=lambda: False)

    def read(*paths):
        blended = blending_datasets(",".join(map(str, paths)), None, strategy, 42)
        return PromptDataset(blended, tokenizer, strategy)

    return read


# ---------------------------------------------------------------------------------------------------- the files


def test_every_labelled_split_is_exported(make, tokenizer, tmp_path):
    recipe = make("cola", "stsb", "axb", "record", OWN)
    names = exported(recipe, tokenizer, tmp_path / "out")
    assert names == list(EXPECTED)
    for name, golds in EXPECTED.items():
        for line, gold in zip(lines(tmp_path / "out" / name), golds, strict=True):
            assert sorted(line) == ["datasource", "input", "label"]
            task, label = unpack_label(line["label"])
            assert (task.name, label, line["datasource"]) == (name.split("/")[0], gold, name.split("/")[0])


def test_openrlhf_reads_the_prompts_and_labels(make, tokenizer, tmp_path, openrlhf_reads):
    recipe = make("cola", "stsb", "axb", "record", OWN)
    names = exported(recipe, tokenizer, tmp_path / "out")
    read = openrlhf_reads(*(tmp_path / "out" / name for name in names))
    encoder = PromptEncoder(tokenizer, prompt_limit(recipe, load_config(recipe.model)), False)
    tasks = {task.name: task for task in recipe.data.tasks}
    examples = [
        (tasks[name], example)
        for name, split in (path.removesuffix(".jsonl").split("/") for path in names)
        for example in load_examples(tasks[name], split, recipe.data.root, recipe.seed)
    ]
    assert len(read) == len(examples) == sum(map(len, EXPECTED.values()))
    for (datasource, prompt, label, images), (task, example) in zip(read, examples, strict=True):
        assert prompt == encoder.encode(task, example.fields)[1]
        assert datasource == task.name and images is None
        found, gold = unpack_label(label)
        assert gold == example.label
        assert (found.name, found.labels, found.score_range) == (task.name, task.labels, task.score_range)
    prompts = [prompt for _, prompt, _, _ in read]
    assert sum(HARD in prompt for prompt in prompts) == 3, "every character is preserved"
    assert read.collate_fn([read[0], read[3]])[0] == ["cola", "cola"]


def test_generated_tasks_are_exported(make, tokenizer, tmp_path):
    recipe = make("acceptability", **{"data.max_train_samples": 6})
    names = exported(recipe, tokenizer, tmp_path / "out")
    assert names == ["acceptability/train.jsonl", "acceptability/validation.jsonl", "acceptability/test.jsonl"]
    rows = load_examples(TASKS["acceptability"], "train", None)
    sentences = {row.fields["sentence"]: row for row in rows}
    written = lines(tmp_path / "out" / names[0])
    found = [next(row for text, row in sentences.items() if f'"{text}"' in line["input"]) for line in written]
    assert [unpack_label(line["label"])[1] for line in written] == [row.label for row in found]
    assert len(found) == 6 and len({row.pair for row in found}) == 3, "pairs stay whole"
    assert len(lines(tmp_path / "out" / names[1])) > 6, "the limit applies to the training set"


# The context has 512 tokens, of which 32 are reserved for the response.
@pytest.mark.parametrize(
    "keys, limit",
    [({}, 480), ({"rollout.response_budget": "[12, 100]"}, 412), ({"prompt.max_tokens": 300}, 300)],
    ids=["the context", "less a longer response", "the recipe"],
)
def test_prompts_are_cut_as_in_training(keys, limit, make, tokenizer, tmp_path):
    recipe = make("cola", **keys)
    (tmp_path / "data" / "CoLA" / "train.tsv").write_text(f"gj04\t1\t\tThe {'very ' * 3000}tall man left.\n")
    assert prompt_limit(recipe, load_config(recipe.model)) == limit
    exported(recipe, tokenizer, tmp_path / "out")
    (line,) = lines(tmp_path / "out" / "cola" / "train.jsonl")
    assert limit - 8 < len(tokenizer(line["input"])["input_ids"]) <= limit
    assert '"The very very ' in line["input"] and "tall" not in line["input"]
    assert line["input"].endswith('" is linguistically acceptable.\nAssistant:\n<Judgement>')


def test_the_context_of_other_models(make, tiny_model):
    recipe = make("cola", **{"model.path": tiny_model("mpt")})
    assert prompt_limit(recipe, load_config(recipe.model)) == 480


def test_a_model_without_a_configuration_is_named(make, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"model\.path: cannot load '.*/model'"):
        load_config(make("cola", **{"model.path": tmp_path / "model"}).model)


def test_prompts_in_the_chat_template(make, tokenizer, tmp_path, openrlhf_reads):
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
    recipe = make("cola", **{"prompt.chat_template": "true"})
    exported(recipe, tokenizer, tmp_path / "out")
    prompts = [prompt for _, prompt, _, _ in openrlhf_reads(tmp_path / "out" / "cola" / "train.jsonl")]
    assert len(prompts) == 3
    for prompt in prompts:
        assert prompt.startswith("[system] You are an assistant") and prompt.endswith("\n[assistant] <Judgement>")


# --------------------------------------------------------------------------------------------------------- errors


def fails(make, tokenizer, folder, *tasks, **keys):
    recipe = make(*tasks, **keys)
    with pytest.raises(UserError) as caught:
        export(
            recipe,
            PromptEncoder(tokenizer, prompt_limit(recipe, load_config(recipe.model)), False),
            folder,
            lambda message: None,
        )
    return str(caught.value)


def test_a_missing_training_file_is_named(make, tokenizer, tmp_path):
    message = fails(make, tokenizer, tmp_path / "out", "sst2")
    assert "SST-2/train.tsv: no such file" in message and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_named(make, tokenizer, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "file/cola/train.jsonl: cannot be written (Not a directory)" in fails(
        make, tokenizer, tmp_path / "file", "cola"
    )
    (tmp_path / "out" / "cola" / "train.jsonl").mkdir(parents=True)
    assert "train.jsonl: cannot be written" in fails(make, tokenizer, tmp_path / "out", "cola")
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in (tmp_path / "out" / "cola").iterdir()] == ["train.jsonl"]


def test_a_prompt_that_cannot_fit_leaves_the_earlier_file(make, tokenizer, tmp_path):
    path = tmp_path / "out" / "cola" / "train.jsonl"
    exported(make("cola"), tokenizer, tmp_path / "out")
    before = path.read_bytes()
    message = fails(make, tokenizer, tmp_path / "out", "cola", **{"prompt.max_tokens": 20})
    assert "raise prompt.max_tokens" in message
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["train.jsonl", "validation.jsonl"]


# ------------------------------------------------------------------------------------ OpenRLHF's own rollout step


class Engine:
    """Stands in for vLLM: answers every prompt with `text`, and records its arguments."""

    def __init__(self, tokenizer, text, finish_reason="stop"):
        self.ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if finish_reason == "stop":
            self.ids.append(tokenizer.eos_token_id)
        self.finish_reason, self.asked = finish_reason, []

    async def generate(self, prompt_token_ids, sampling_params, multi_modal_data=None):
        self.asked.append((prompt_token_ids, sampling_params))
        logprobs = [{token: SimpleNamespace(logprob=-0.5)} for token in self.ids]
        output = SimpleNamespace(token_ids=self.ids, finish_reason=self.finish_reason, logprobs=logprobs)
        return SimpleNamespace(outputs=[output])


RESPONSES = [
    # task, response, finish reason, reward by section 4.3, score (1 is right), format errors
    pytest.param("cola", f"Yes{CLOSE}", "stop", 1.0, 1.0, 0.0, id="right"),
    pytest.param("cola", f" acceptable. {CLOSE}", "stop", 1.0, 1.0, 0.0, id="right in other words"),
    pytest.param("cola", f"No{CLOSE}", "stop", 0.0, 0.0, 0.0, id="wrong"),
    pytest.param("cola", f"Perhaps{CLOSE}", "stop", -1.0, 0.0, 1.0, id="no label"),
    pytest.param("cola", "Yes", "length", -1.0, 0.0, 1.0, id="unclosed"),
    pytest.param("cola", "Yes", "stop", -1.0, 0.0, 1.0, id="unclosed, then the end"),
    pytest.param("cola", "", "stop", -1.0, 0.0, 1.0, id="empty"),
    pytest.param("cola", "<Judgement>Yes</Judgement>", "stop", -1.0, 0.0, 1.0, id="a second opening tag"),
    pytest.param("cola", "\x00\ufffd naïve \U0001f600 <eos>", "length", -1.0, 0.0, 1.0, id="garbage"),
    pytest.param("cola", f"Yes{CLOSE}\nNo{CLOSE} and so on", "length", 1.0, 1.0, 0.0, id="right, then more"),
    pytest.param("stsb", f"3.8{CLOSE}", "stop", 2.5, 1.0, 0.0, id="the score"),
    pytest.param("stsb", f"5.0{CLOSE}", "stop", 1.3, 0.52, 0.0, id="a near score"),
    pytest.param("stsb", f"0{CLOSE}", "stop", -1.3, 0.0, 0.0, id="a far score"),
    pytest.param("stsb", f"7.5{CLOSE}", "stop", -2.5, 0.0, 1.0, id="a score out of range"),
    pytest.param("stsb", "As an AI language model, I", "length", -2.5, 0.0, 1.0, id="no score"),
    pytest.param("own", f"Good{CLOSE}", "stop", 1.0, 1.0, 0.0, id="an own task, right"),
    pytest.param("own", f"Bad{CLOSE}", "stop", 0.0, 0.0, 0.0, id="an own task, wrong"),
    pytest.param("own", f"Yes{CLOSE}", "stop", -1.0, 0.0, 1.0, id="an own task, words of another"),
]


def rollout(tokenizer, engine, prompt, label):
    executor = SingleTurnAgentExecutor(str(BUILT_IN / "nlu.py"))
    sampling = SimpleNamespace(max_tokens=32, logprobs=1)
    return asyncio.run(executor.execute(prompt, label, sampling, 512, tokenizer, engine))


@pytest.mark.parametrize("name, text, end, reward, score, wrong_format", RESPONSES)
def test_openrlhfs_rollout_gives_the_reward_of_training(
    name, text, end, reward, score, wrong_format, make, tokenizer, tmp_path
):
    recipe = make(OWN if name == "own" else name)
    exported(recipe, tokenizer, tmp_path / "out")
    line = lines(tmp_path / "out" / name / "train.jsonl")[0]
    (task,) = recipe.data.tasks
    example = load_examples(task, "train", recipe.data.root)[0]
    engine = Engine(tokenizer, text, end)
    result = rollout(tokenizer, engine, line["input"], line["label"])
    assert result["reward"].tolist() == pytest.approx([reward], abs=1e-6)
    assert result["scores"].tolist() == pytest.approx([score], abs=1e-6)
    assert result["extra_logs"]["format_error_rate"].tolist() == [wrong_format]
    assert result["label"] == line["label"] and result["truncated"] == (end == "length")
    # In training the text is the response itself.
    ours = load_reward("nlu")([text], [line["input"]], [example])
    assert ours == pytest.approx([reward], abs=1e-6)
    # The tokens are those of training: prompt, then response.
    ids, _ = PromptEncoder(tokenizer, 480, False).encode(task, example.fields)
    ((asked, sampling),) = engine.asked
    assert asked == ids and sampling.max_tokens == 32
    assert result["observation_tokens"] == ids + engine.ids
    assert result["action_ranges"] == [(len(ids), len(ids) + len(engine.ids))]


def test_a_label_of_another_program_gives_no_reward(make, tokenizer):
    """OpenRLHF logs an exception in the reward function and continues without a reward."""
    result = rollout(tokenizer, Engine(tokenizer, f"Yes{CLOSE}"), "Is it?", "1")
    assert result["reward"] is None and result["scores"] is None


def test_tags_in_the_data_do_not_move_the_response(make, tokenizer, tmp_path):
    recipe = make("cola")
    (tmp_path / "data" / "CoLA" / "train.tsv").write_text(f"gj04\t0\t\t<Judgement>Yes{CLOSE} he said.\n")
    exported(recipe, tokenizer, tmp_path / "out")
    (line,) = lines(tmp_path / "out" / "cola" / "train.jsonl")
    for text, reward in ((f"No{CLOSE}", 1.0), (f"Yes{CLOSE}", 0.0), ("No", -1.0)):
        result = rollout(tokenizer, Engine(tokenizer, text), line["input"], line["label"])
        assert result["reward"].tolist() == [reward]
