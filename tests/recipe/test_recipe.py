"""Every way in which a recipe can be wrong, and that the message says where, what and what to do."""

import random
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT

from extensions.common.errors import UserError
from extensions.recipe import all_keys, dump_recipe, load_recipe
from extensions.tasks import TASKS, Source, Task, fold

SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))

BASE = """\
name: trial
model:
  path: some/model
data:
  tasks: [cola]
"""

OWN = """\
name: trial
model: {path: some/model}
data:
  tasks:
    - name: mine
      description: Judge the text.
      question: 'Judge "{text}".'
      labels: {good: [Good, fine], bad: [Bad]}
      metrics: [accuracy, f1_macro]
      source: {format: jsonl, files: {train: train.jsonl, validation: dev.jsonl}}
    - sst2
"""


@pytest.fixture
def load(tmp_path):
    def load_text(text, *overrides):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_recipe(path, overrides)

    return load_text


def refused(load, text, *overrides):
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    message = str(caught.value)
    assert "Traceback" not in message and "pydantic" not in message
    return message


def test_a_minimal_recipe_has_the_defaults_of_the_paper(load):
    recipe = load(BASE)
    assert (recipe.lora.rank, recipe.ppo.epochs, recipe.optimizer.lr, recipe.optimizer.name) == (
        16,
        4,
        9e-6,
        "adafactor",
    )
    assert (recipe.rollout.response_budget, recipe.rollout.temperature) == ([12, 32], 1.0)
    assert (recipe.schedule.name, recipe.schedule.warmup_ratio, recipe.schedule.min_lr_ratio) == ("cosine", 0.1, 0.1)
    assert (recipe.lora.alpha, recipe.lora.dropout, recipe.lora.rslora) == (32, 0.05, True)
    assert (recipe.ppo.clip, recipe.ppo.gamma, recipe.ppo.lam, recipe.ppo.value_coef) == (0.2, 1.0, 0.95, 0.1)
    assert (recipe.ppo.kl.init, recipe.ppo.kl.target, recipe.ppo.kl.horizon) == (0.2, 6.0, 10000.0)
    assert recipe.ppo.whiten and recipe.ppo.kl.adaptive
    assert not recipe.model.trust_remote_code
    assert recipe.run_dir == Path("runs/trial")
    assert load(BASE + "output_dir: elsewhere\n").run_dir == Path("elsewhere")


# (id, text appended to BASE, what the message must hold)
WRONG = [
    ("unknown key", "lorra: {rank: 8}\n", ["line 6", "lorra", "unknown key", "did you mean 'lora'"]),
    ("unknown sub-key", "ppo:\n  epoch: 4\n", ["line 7", "ppo.epoch", "unknown key", "did you mean 'epochs'"]),
    ("key of another section", "learning_rate: 1e-5\n", ["line 6", "learning_rate", "unknown key"]),
    ("key in the wrong section", "ppo: {lr: 1e-5}\n", ["line 6", "ppo.lr", "did you mean 'optimizer.lr'"]),
    ("key at the top", "rank: 8\n", ["line 6", "rank", "did you mean 'lora.rank'"]),
    ("hopeless key", "zzzzqqq: 1\n", ["line 6", "zzzzqqq", "unknown key", "Allowed here", "optimizer"]),
    ("text for a number", "max_steps: many\n", ["line 6", "max_steps", "'many'"]),
    ("float for an integer", "max_steps: 1.5\n", ["line 6", "max_steps", "1.5"]),
    ("boolean for an integer", "seed: yes\n", ["line 6", "seed", "True"]),
    ("boolean for a number", "optimizer: {lr: true}\n", ["line 6", "optimizer.lr", "True"]),
    ("number for text", "reward: 5\n", ["line 6", "reward", "5", "string"]),
    ("text for a boolean", "ppo: {whiten: 'true'}\n", ["line 6", "ppo.whiten", "'true'", "boolean"]),
    ("list for a section", "ppo: [1]\n", ["line 6", "ppo", "[1]"]),
    ("value for a section", "ppo: 4\n", ["line 6", "ppo", "4"]),
    ("null for a section", "ppo:\n", ["line 6", "ppo", "None"]),
    ("null for a number", "seed:\n", ["line 6", "seed", "None"]),
    ("date for text", "reward: 2020-01-02\n", ["line 6", "reward"]),
    ("too low", "lora: {rank: 0}\n", ["line 6", "lora.rank", "0", "greater than or equal to 1"]),
    ("too high", "lora:\n  dropout: 1\n", ["line 7", "lora.dropout", "1", "less than 1"]),
    ("negative", "seed: -1\n", ["line 6", "seed", "-1"]),
    ("not a number", "optimizer: {lr: .nan}\n", ["line 6", "optimizer.lr", "nan"]),
    ("infinite", "optimizer: {lr: 1e999}\n", ["line 6", "optimizer.lr", "finite"]),
    ("not a choice", "schedule: {name: cosin}\n", ["line 6", "schedule.name", "'cosin'", "'cosine'", "'linear'"]),
    ("not a stage", "deepspeed: {zero_stage: 4}\n", ["line 6", "deepspeed.zero_stage", "4"]),
    ("short list", "optimizer: {betas: [0.9]}\n", ["line 6", "optimizer.betas", "0.9"]),
    ("bad name", "output_dir: 5\n", ["line 6", "output_dir", "5"]),
]


@pytest.mark.parametrize("text, parts", [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_a_wrong_key_is_named_with_line_and_value(load, text, parts):
    message = refused(load, BASE + text)
    for part in parts:
        assert part in message
    assert "1 error in the recipe" in message


CONTRADICTIONS = [
    ("adafactor", "deepspeed: {zero_stage: 2}\n", ["deepspeed.zero_stage: 2", "optimizer.name: adafactor", "adamw"]),
    ("offload", "deepspeed: {offload: true}\n", ["deepspeed.offload", "deepspeed.zero_stage"]),
    ("budget", "rollout: {response_budget: [40, 32]}\n", ["rollout.response_budget: [40, 32]", "low <= high"]),
    ("mini-batch", "ppo: {mini_batch_size: 5}\n", ["ppo.mini_batch_size: 5", "ppo.batch_size: 16"]),
    ("patience", "evaluation: {patience: 3}\n", ["evaluation.patience", "evaluation.every_steps"]),
]


@pytest.mark.parametrize("text, parts", [row[1:] for row in CONTRADICTIONS], ids=[row[0] for row in CONTRADICTIONS])
def test_a_contradiction_names_both_keys(load, text, parts):
    message = refused(load, BASE + text)
    for part in parts:
        assert part in message


def test_a_task_named_twice(load):
    message = refused(load, BASE.replace("[cola]", "[cola, rte, cola]"))
    assert "data.tasks" in message and "'cola' is named twice" in message


@pytest.mark.parametrize("key", ["name", "model", "model.path", "data", "data.tasks"])
def test_a_missing_key_is_named(load, key):
    raw = yaml.safe_load(BASE)
    *parents, last = key.split(".")
    place = raw
    for parent in parents:
        place = place[parent]
    place.pop(last)
    message = refused(load, yaml.safe_dump(raw))
    assert f"{key}: missing" in message


def test_all_errors_at_once(load):
    text = BASE + "lorra: 1\nseed: -1\nppo: {epochs: 0, clip: x}\nschedule: {name: sin}\nevaluation: {patience: 3}\n"
    message = refused(load, text)
    assert "6 errors in the recipe" in message
    lines = message.split("\n")[1:]
    assert len(lines) == 6
    for part in ("lorra", "seed", "ppo.epochs", "ppo.clip", "schedule.name", "evaluation.patience"):
        assert sum(re.match(rf"\s*(line \d+: )?{re.escape(part)}\b", line) is not None for line in lines) == 1, part


def test_both_contradictions_at_once(load):
    message = refused(load, BASE + "deepspeed: {zero_stage: 3}\nppo: {mini_batch_size: 5}\nseed: no\n")
    assert "3 errors" in message
    for part in ("deepspeed.zero_stage", "ppo.mini_batch_size", "line 8: seed"):
        assert part in message


# ------------------------------------------------------------------------------------------------------ YAML itself


def test_a_key_given_twice(load):
    message = refused(load, BASE + "seed: 1\nppo:\n  epochs: 1\n  clip: 0.1\n  epochs: 2\n")
    assert "line 10" in message and "'epochs' is given twice" in message
    assert "'seed' is given twice" in refused(load, BASE + "seed: 1\nseed: 1\n")


@pytest.mark.parametrize("text, value", [("1e-5", 1e-5), ("1.0e-5", 1e-5), ("3E-4", 3e-4), ("1", 1.0), ("'0.5'", 0.5)])
def test_numbers_that_yaml_reads_as_text(load, text, value):
    assert load(BASE + f"optimizer: {{lr: {text}}}\n").optimizer.lr == value
    assert load(BASE, f"optimizer.lr={text}").optimizer.lr == value


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "true", "Yes", "NO", "1", "1.5", "null"])
@pytest.mark.parametrize("form", ["{{a: [{0}], b: [B]}}", "{{{0}: [A], b: [B]}}", "[{0}, other]", "{{a: {0}, b: B}}"])
def test_bare_label_words_that_yaml_does_not_read_as_text(load, word, form):
    text = OWN.replace("{good: [Good, fine], bad: [Bad]}", form.format(word))
    message = refused(load, text)
    assert "data.tasks[0].labels" in message and "quote it" in message
    assert repr(yaml.safe_load(word)) in message
    load(OWN.replace("{good: [Good, fine], bad: [Bad]}", form.format(f'"{word}"')))


@pytest.mark.parametrize(
    "content, part",
    [
        ("", "got NoneType"),
        ("# only a comment\n", "got NoneType"),
        ("- a\n- b\n", "got list"),
        ("just text\n", "got str"),
        ("name: [1\n", "not valid YAML"),
        ("a: b: c\n", "not valid YAML"),
        ("name:\n\t- x\n", "not valid YAML"),
        ("name: *x\n", "not valid YAML"),
        ("name: !!python/object:os.system x\n", "not valid YAML"),
        ("name: a\n---\nname: b\n", "not valid YAML"),
        ("name: 2020-13-45\n", "not valid YAML"),
        ("? [a]\n: b\n", "not valid YAML"),
        ("[" * 20000, "not valid YAML"),
        (b"\xff\xfe\x00name", "UTF-8"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "UTF-8"),
        pytest.param(
            b"\x00\x01\x02\x03",
            "not valid YAML",
        ),
        pytest.param(
            "x: &a {b: *a}\n",
            "an alias refers to a value that contains it",
        ),
        pytest.param(
            BASE + "1: 2\n",
            "1",
        ),
    ],
)
def test_files_that_are_no_recipes(load, content, part):
    message = refused(load, content)
    assert part in message and "recipe.yaml" in message


@pytest.mark.parametrize(
    "value, part",
    [
        ("!!int ''", "'' is not of the type int"),
        ("!!bool x", "'x' is not of the type bool"),
        ("!!timestamp x", "'x' is not of the type timestamp"),
        ("!!float x", "'x' is not of the type float"),
        ("2020-13-45", "'2020-13-45' is not of the type timestamp (month must be in 1..12)"),
        ("!!map [1]", "expected a mapping"),
        ("{[a]: b}", "unhashable key"),
        ("{a: 1, a: 2}", "'a' is given twice"),
        ("18446744073709551616", "more than 64 bits"),
        ("0x" + "f" * 5000, "more than 64 bits"),  # Python reads it, but refuses to print it
        ("9" * 5000, "is not of the type int"),
        ('"a\\ud800"', "half of a surrogate pair"),
        ('"a\\0"', "holds NUL"),
    ],
)
def test_values_that_yaml_lets_through(load, value, part):
    message = refused(load, BASE + f"seed: {value}\n")
    assert part in message and "line 6" in message
    message = refused(load, BASE, f"seed={value}")
    assert part in message and "seed=" in message


def laughs(levels):
    """Lists of nine aliases to the list before: 9 ** levels values."""
    lists = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9 if n else ['x'] * 9)}]\n" for n in range(levels)]
    return "".join(lists)


def test_aliases_that_stand_for_too_much(load):
    assert "more than 100000 values with aliases expanded" in refused(load, BASE + laughs(12))
    assert "l1: unknown key" in refused(load, BASE + laughs(2))


@pytest.mark.parametrize("word", ["<5", "a<b", "Judgement", " "])
def test_label_words_that_no_answer_could_hold(load, word):
    message = refused(load, OWN.replace("bad: [Bad]", f'bad: ["{word}"]'))
    assert f"label word {word!r} is empty, or holds '<'" in message


def test_aliases_are_values(load):
    recipe = load(BASE + "ppo: {batch_size: &n 8, mini_batch_size: *n}\n")
    assert recipe.ppo.mini_batch_size == 8


def test_an_override_of_very_many_parts(load):
    assert "no key has that many parts" in refused(load, BASE, f"{'a.' * 5000}b=1")


@pytest.mark.parametrize("high", [".inf", ".nan"])
def test_a_range_of_scores_has_ends(load, high):
    own = OWN.replace("labels: {good: [Good, fine], bad: [Bad]}", f"score_range: [0, {high}]")
    assert "score_range must be [low, high]" in refused(load, own.replace("[accuracy, f1_macro]", "[pearson]"))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such recipe"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(tmp_path)


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(load):
    assert load(BASE.replace("\n", "\r\n")) == load(BASE)
    assert load("\ufeff" + BASE) == load(BASE)


# -------------------------------------------------------------------------------------------------------- overrides


def test_overrides(load):
    recipe = load(BASE, "ppo.batch_size=8", "optimizer.lr=1e-4", "name=other", "output_dir=null", "ppo.kl.init=0")
    assert (recipe.ppo.batch_size, recipe.optimizer.lr, recipe.name, recipe.ppo.kl.init) == (8, 1e-4, "other", 0.0)
    assert recipe.output_dir is None
    assert [task.name for task in load(BASE, "data.tasks=cola,sst2").data.tasks] == ["cola", "sst2"]
    assert [task.name for task in load(BASE, "data.tasks=[rte, stsb]").data.tasks] == ["rte", "stsb"]
    assert [task.name for task in load(BASE, "data.tasks=rte").data.tasks] == ["rte"]
    assert load(BASE, "seed=1", "seed=2").seed == 2
    assert load(BASE, "model.path=a=b").model.path == "a=b"
    assert load(BASE, "lora.target_modules=[q_proj]").lora.target_modules == ["q_proj"]


@pytest.mark.parametrize(
    "override, parts",
    [
        ("ppo.batch_size", ["'ppo.batch_size'", "key.sub=value"]),
        ("=8", ["'=8'", "key.sub=value"]),
        ("", ["key.sub=value"]),
        ("ppo.batchsize=8", ["ppo.batchsize", "did you mean 'batch_size'"]),
        ("ppo.batch_size=x", ["ppo.batch_size", "'x'"]),
        ("ppo.batch_size=", ["ppo.batch_size", "None"]),
        ("batch_size=8", ["batch_size", "unknown key", "ppo.batch_size"]),
        ("seed=[1", ["'seed=[1'", "not valid YAML"]),
        ("name.x=1", ["'name.x=1'", "name holds a value"]),
        ("data.tasks.0=cola", ["data.tasks.0=cola", "data.tasks holds a value"]),
        ("ppo..x=1", ["ppo"]),
        ("data.tasks=colla", ["data.tasks[0]", "'colla'", "did you mean 'cola'"]),
        ("ppo=3", ["ppo", "3"]),
        pytest.param("name.x.y=1", ["name"]),
        pytest.param(
            "seed=2020-13-45",
            ["seed"],
        ),
        pytest.param(
            "seed=" + "[" * 20000,
            ["seed"],
        ),
    ],
)
def test_bad_overrides(load, override, parts):
    message = refused(load, BASE, override)
    for part in parts:
        assert part in message
    assert override.startswith("seed=") is False or "override" in message


def test_template_options(load):
    assert load(BASE).prompt.template_options == {}
    recipe = load(BASE, "prompt.chat_template=true", "prompt.template_options={reasoning_effort: low, budget: 3}")
    assert recipe.prompt.template_options == {"reasoning_effort": "low", "budget": 3}
    recipe = load(BASE, "prompt.chat_template=true", "prompt.template_options.enable_thinking=true")
    assert recipe.prompt.template_options == {"enable_thinking": True}
    assert load(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize(
    "value, parts",
    [
        ("low", ["'low'", "dictionary"]),
        ("{a b: 1}", ["'a b'", "not a valid name"]),
        ("{1: 1}", ["1 is not a valid name"]),
        ("{messages: x}", ["'messages'", "set by the prompt encoder"]),
        ("{tokenize: true}", ["'tokenize'"]),
        ("{add_generation_prompt: false}", ["'add_generation_prompt'"]),
        ("{return_tensors: pt}", ["'return_tensors'"]),
        ("{a: [1]}", ["'a'", "[1]", "allowed"]),
        ("{a: .inf}", ["'a'", "inf", "allowed"]),
        ("{a: 2020-01-01}", ["'a'", "allowed"]),
    ],
)
def test_bad_template_options(load, value, parts):
    message = refused(load, BASE, "prompt.chat_template=true", f"prompt.template_options={value}")
    for part in ("prompt.template_options", *parts):
        assert part in message
    assert "1 error" in message


def test_template_options_need_a_template(load):
    message = refused(load, BASE, "prompt.template_options={enable_thinking: true}")
    assert "prompt.template_options needs prompt.chat_template: true" in message


# -------------------------------------------------------------------------------------------------------- own tasks


def test_own_tasks(load):
    task = load(OWN).data.tasks[0]
    assert task.labels == {"good": ["Good", "fine"], "bad": ["Bad"]}
    assert task.answer("good") == "Good"
    short = load(OWN.replace("{good: [Good, fine], bad: [Bad]}", "[Good, Bad]")).data.tasks[0]
    assert short.labels == {"Good": ["Good"], "Bad": ["Bad"]}


@pytest.mark.parametrize(
    "old, new, parts",
    [
        ("labels: {good: [Good, fine], bad: [Bad]}", "labels: [Good]", ["two entries"]),
        ("labels: {good: [Good, fine], bad: [Bad]}", "labels: [Good, good]", ["distinct", "good"]),
        ("labels: {good: [Good, fine], bad: [Bad]}", "labels: {good: [x], bad: [X]}", ["distinct"]),
        ("labels: {good: [Good, fine], bad: [Bad]}", "labels: [Good, ' ']", ["empty"]),
        ("labels: {good: [Good, fine], bad: [Bad]}", "labels: [Good, '</Judgement>']", ["tags"]),
        (
            "labels: {good: [Good, fine], bad: [Bad]}",
            "label: [Good]",
            ["label", "unknown key", "did you mean 'labels'"],
        ),
        ("labels: {good: [Good, fine], bad: [Bad]}", "score_range: [5, 0]", ["low < high"]),
        ("labels: {good: [Good, fine], bad: [Bad]}", "score_range: [0]", ["score_range"]),
        ("metrics: [accuracy, f1_macro]", "metrics: [f1]", ["f1", "positive"]),
        ("metrics: [accuracy, f1_macro]", "metrics: [pearson]", ["pearson", "classification"]),
        ("metrics: [accuracy, f1_macro]", "metrics: [acc]", ["metrics", "'acc'", "'accuracy'"]),
        ("metrics: [accuracy, f1_macro]", "metrics: []", ["metrics"]),
        ("metrics: [accuracy, f1_macro]", "positive: God", ["positive", "'God'", "good"]),
        ("metrics: [accuracy, f1_macro]", "truncate: txt", ["truncate", "'txt'", "text"]),
        ("""question: 'Judge "{text}".'""", "question: Judge.", ["question", "field"]),
        ("description: Judge the text.", "description: ''", ["description"]),
        ("name: mine", "name: a b", ["name", "'a b'"]),
        ("train: train.jsonl", "training: train.jsonl", ["training", "allowed: train"]),
        ("format: jsonl", "format: xlsx", ["format", "'xlsx'", "'csv'", "'parquet'"]),
    ],
)
def test_own_tasks_are_checked(load, old, new, parts):
    assert old in OWN
    message = refused(load, OWN.replace(old, new))
    assert "data.tasks[0]" in message
    for part in parts:
        assert part in message


def test_an_unknown_task_is_named_with_the_nearest(load):
    message = refused(load, BASE.replace("cola", "CoLa2"))
    assert "data.tasks[0]" in message and "'CoLa2'" in message and "did you mean 'cola'" in message
    assert all(name in message for name in TASKS)


# ------------------------------------------------------------------------------------- show, descriptions, recipes


@pytest.mark.parametrize("text", [BASE, OWN, BASE.replace("[cola]", "[cola, sst2, rte, stsb, acceptability]")])
def test_the_shown_recipe_loads_to_the_same(load, text):
    recipe = load(text, "optimizer.lr=1e-7", "seed=7", 'model.path="ünï/{x} \\u2028"', "ppo.kl.horizon=1e20")
    shown = dump_recipe(recipe)
    assert load(shown) == recipe
    assert dump_recipe(load(shown)) == shown
    keys = {key.split(".")[0] for key in all_keys()}
    assert keys == set(yaml.safe_load(shown)), "every default is filled in"


@settings(max_examples=40)
@given(
    labels=st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="\0<"), min_size=1, max_size=8).filter(
            lambda t: t.strip()
        ),
        st.just(0),
        min_size=2,
        max_size=4,
    ),
    text=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30),
)
def test_own_tasks_survive_the_round_trip(tmp_path_factory, labels, text):
    if len({fold(word) for word in labels}) < len(labels) or any("judgement" in word.lower() for word in labels):
        return
    text = text.replace("{", "{{").replace("}", "}}")
    entry = {"name": "own", "description": text, "question": text + "{x}", "labels": list(labels)}
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    raw = {"name": "a", "model": {"path": "b"}, "data": {"tasks": [entry]}}
    path.write_text(yaml.safe_dump(raw, allow_unicode=True), encoding="utf-8")
    recipe = load_recipe(path)
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_every_key_is_described():
    fields = all_keys() | {f"task.{k}": f for k, f in Task.model_fields.items()}
    fields |= {f"source.{k}": f for k, f in Source.model_fields.items()}
    assert len(fields) > 70
    for key, field in fields.items():
        assert field.description and len(field.description) > 5, key


def test_every_shipped_recipe_loads():
    assert SHIPPED, "no recipes found"
    names = [load_recipe(path).name for path in SHIPPED]
    assert len(names) == len(list((ROOT / "recipes").iterdir())), "a file in recipes/ that is not a .yaml recipe"
    assert len(set(names)) == len(names), "two recipes would share a run folder"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_shows_and_loads_back(path, load):
    recipe = load_recipe(path)
    assert load(dump_recipe(recipe)) == recipe


# ------------------------------------------------------------------------------------------------------------- fuzz

SNIPPETS = [
    *(
        "\n",
        ": ",
        ":",
        "-",
        "- ",
        "[",
        "]",
        "{",
        "}",
        ",",
        "'",
        '"',
        "#",
        "  ",
        "\t",
        "null",
        "~",
        "true",
        "no",
        "1e-5",
    ),
    *("!!float x", "!!int ", "!!python/name:os ", "? ", "|", ">", "---\n", "2020-13-45", "0b_", "0x", "-1", ".nan"),
    *(
        "\u2028",
        "\ufeff",
        "é",
        "ppo",
        "labels",
        "name",
        "seed: 3\n",
        "lora: {rank: 4}\n",
        "%YAML 9.9\n",
        "@",
        "`",
        "=",
        "<<",
    ),
]


@given(st.sampled_from([BASE, OWN, *(path.read_text(encoding="utf-8") for path in SHIPPED)]), st.integers(0, 2**32))
def test_mutated_recipes_only_ever_raise_user_errors(tmp_path_factory, text, seed):
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 5)):
        place, length = rng.randrange(len(text) + 1), rng.choice([0, 0, 1, 3, 20])
        text = text[:place] + rng.choice([*SNIPPETS, ""]) + text[place + length :]
    path = tmp_path_factory.getbasetemp() / "mutated.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    try:
        recipe = load_recipe(path)
    except UserError as error:
        assert "mutated.yaml" in str(error)
    else:
        assert recipe.data.tasks


def test_every_key_of_every_recipe_says_unit_or_origin():
    """Each `key: value` line of a shipped recipe carries a comment (a section alone needs none)."""
    lines = [
        (path.name, line)
        for path in SHIPPED
        for line in path.read_text().splitlines()
        if re.match(r"\s*\w+: +[^ #]", line)
    ]
    assert len(lines) > 10 * len(SHIPPED)
    assert [(name, line) for name, line in lines if "  # " not in line] == []
