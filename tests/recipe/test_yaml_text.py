"""YAML that a recipe may not contain, and recipes with random edits."""

import random

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support import BASE_RECIPE, OWN_TASK_RECIPE, ROOT, refused

from extensions.common.errors import UserError
from extensions.recipe import load_recipe

SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))


def test_a_key_given_twice(load):
    message = refused(load, BASE_RECIPE + "seed: 1\nppo:\n  epochs: 1\n  clip: 0.1\n  epochs: 2\n")
    assert "line 10" in message and "'epochs' is given twice" in message
    assert "'seed' is given twice" in refused(load, BASE_RECIPE + "seed: 1\nseed: 1\n")


@pytest.mark.parametrize("text, value", [("1e-5", 1e-5), ("1.0e-5", 1e-5), ("3E-4", 3e-4), ("1", 1.0), ("'0.5'", 0.5)])
def test_numbers_that_yaml_reads_as_text(load, text, value):
    assert load(BASE_RECIPE + f"optimizer: {{lr: {text}}}\n").optimizer.lr == value
    assert load(BASE_RECIPE, f"optimizer.lr={text}").optimizer.lr == value


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "true", "Yes", "NO", "1", "1.5", "null"])
@pytest.mark.parametrize("form", ["{{a: [{0}], b: [B]}}", "{{{0}: [A], b: [B]}}", "[{0}, other]", "{{a: {0}, b: B}}"])
def test_bare_label_words_that_yaml_does_not_read_as_text(load, word, form):
    text = OWN_TASK_RECIPE.replace("{good: [Good, fine], bad: [Bad]}", form.format(word))
    message = refused(load, text)
    assert "data.tasks[0].labels" in message and "quote it" in message
    assert repr(yaml.safe_load(word)) in message
    load(OWN_TASK_RECIPE.replace("{good: [Good, fine], bad: [Bad]}", form.format(f'"{word}"')))


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
            BASE_RECIPE + "1: 2\n",
            "1",
        ),
    ],
)
def test_files_that_are_not_recipes(load, content, part):
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
def test_values_that_plain_yaml_accepts(load, value, part):
    message = refused(load, BASE_RECIPE + f"seed: {value}\n")
    assert part in message and "line 6" in message
    message = refused(load, BASE_RECIPE, f"seed={value}")
    assert part in message and "seed=" in message


def laughs(levels):
    """Lists of nine aliases to the list before: 9 ** levels values."""
    lists = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9 if n else ['x'] * 9)}]\n" for n in range(levels)]
    return "".join(lists)


def test_exploding_aliases(load):
    assert "more than 100000 values with aliases expanded" in refused(load, BASE_RECIPE + laughs(12))
    assert "l1: unknown key" in refused(load, BASE_RECIPE + laughs(2))


@pytest.mark.parametrize("word", ["<5", "a<b", "Judgement", " "])
def test_label_words_that_no_answer_can_hold(load, word):
    message = refused(load, OWN_TASK_RECIPE.replace("bad: [Bad]", f'bad: ["{word}"]'))
    assert f"label word {word!r} is empty, or holds '<'" in message


def test_aliases_are_values(load):
    recipe = load(BASE_RECIPE + "ppo: {batch_size: &n 8, mini_batch_size: *n}\n")
    assert recipe.ppo.mini_batch_size == 8


def test_an_override_with_too_many_parts(load):
    assert "no key has that many parts" in refused(load, BASE_RECIPE, f"{'a.' * 5000}b=1")


@pytest.mark.parametrize("high", [".inf", ".nan"])
def test_a_range_of_scores_is_finite(load, high):
    own = OWN_TASK_RECIPE.replace("labels: {good: [Good, fine], bad: [Bad]}", f"score_range: [0, {high}]")
    assert "score_range must be [low, high]" in refused(load, own.replace("[accuracy, f1_macro]", "[pearson]"))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such recipe"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(tmp_path)


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(load):
    assert load(BASE_RECIPE.replace("\n", "\r\n")) == load(BASE_RECIPE)
    assert load("\ufeff" + BASE_RECIPE) == load(BASE_RECIPE)


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


@pytest.mark.slow
@given(
    st.sampled_from([BASE_RECIPE, OWN_TASK_RECIPE, *(path.read_text(encoding="utf-8") for path in SHIPPED)]),
    st.integers(0, 2**32),
)
def test_mutated_recipes_raise_only_user_errors(tmp_path_factory, text, seed):
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
