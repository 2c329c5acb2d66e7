"""From SuperGLUE's nested objects, and the hub's flat form, to rows."""

import copy
import json

import pytest
from hypothesis import example as case
from hypothesis import given, settings
from hypothesis import strategies as st

from extensions.common.errors import UserError
from extensions.data import load_examples
from extensions.data.nested import highlights, multirc, record, winogender, wsc
from extensions.tasks import SUITES, TASKS

MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError)


# --------------------------------------------------------------------------------------------------------- MultiRC

PASSAGE = "Mia baked a pie. Tom ate it."
MULTIRC = {
    "idx": 7,
    "version": 1.1,
    "passage": {
        "text": PASSAGE,
        "questions": [
            {
                "question": "Who baked?",
                "idx": 20,
                "answers": [{"text": "Mia", "idx": 61, "label": 1}, {"text": "Tom", "idx": 62, "label": 0}],
            },
            {"question": "What was eaten?", "idx": 21, "answers": [{"text": "a pie", "idx": 63, "label": 1}]},
        ],
    },
}
MULTIRC_FLAT = [
    {
        "paragraph": PASSAGE,
        "question": question,
        "answer": answer,
        "label": label,
        "idx": {"paragraph": 7, "question": number, "answer": index},
    }
    for question, answer, label, number, index in [
        ("Who baked?", "Mia", 1, 20, 61),
        ("Who baked?", "Tom", 0, 20, 62),
        ("What was eaten?", "a pie", 1, 21, 63),
    ]
]


def test_multirc_gives_one_row_per_answer():
    names = ("passage", "question", "answer", "label", "paragraph_idx", "question_idx", "answer_idx")
    assert [tuple(row[name] for name in names) for row in multirc(MULTIRC)] == [
        (PASSAGE, "Who baked?", "Mia", 1, 7, 20, 61),
        (PASSAGE, "Who baked?", "Tom", 0, 7, 20, 62),
        (PASSAGE, "What was eaten?", "a pie", 1, 7, 21, 63),
    ]


def test_multirc_of_the_hub_gives_the_same_rows():
    assert [row for flat in MULTIRC_FLAT for row in multirc(flat)] == list(multirc(MULTIRC))


def test_multirc_without_labels():
    nested, flat = copy.deepcopy(MULTIRC), [{k: v for k, v in row.items() if k != "label"} for row in MULTIRC_FLAT]
    for question in nested["passage"]["questions"]:
        for answer in question["answers"]:
            del answer["label"]
    assert [row["label"] for row in multirc(nested)] == [None] * 3
    assert [row for one in flat for row in multirc(one)] == list(multirc(nested))


# ---------------------------------------------------------------------------------------------------------- ReCoRD

#       0         1         2         3         4         5         6         7
#       0123456789012345678901234567890123456789012345678901234567890123456789012345678
NEWS = "Ann Bell met Bob Ray in Oslo. Bob Ray smiled. The Oslo Times told of Ann Bell.\n@highlight\nAnn wins"
RECORD = {
    "idx": 3,
    "source": "Daily mail",
    "passage": {
        "text": NEWS,
        # unordered, some repeated; the ends are the positions of the last characters
        "entities": [
            {"start": 69, "end": 76},
            {"start": 24, "end": 27},
            {"start": 0, "end": 7},
            {"start": 46, "end": 59},
            {"start": 30, "end": 36},
            {"start": 13, "end": 19},
        ],
    },
    "qas": [
        {
            "idx": 11,
            "query": "It was @placeholder who smiled at the camera",
            "answers": [{"start": 13, "end": 19, "text": "Bob Ray"}, {"start": 30, "end": 36, "text": "Bob Ray"}],
        },
        {
            "idx": 12,
            "query": "@placeholder said so, and @placeholder is believed",
            "answers": [{"start": 46, "end": 59, "text": "Oslo Times"}, {"start": 69, "end": 76, "text": "ann bell!"}],
        },
    ],
}
TEXT = "Ann Bell met Bob Ray in Oslo. Bob Ray smiled. The Oslo Times told of Ann Bell. Ann wins."
ENTITIES = ["Ann Bell", "Bob Ray", "Oslo", "The Oslo Times"]
RECORD_FLAT = [
    {
        "passage": NEWS,
        "query": "It was @placeholder who smiled at the camera",
        "entities": ENTITIES,
        "answers": ["Bob Ray"],
        "idx": {"passage": 3, "query": 11},
    },
    {
        "passage": NEWS,
        "query": "@placeholder said so, and @placeholder is believed",
        "entities": ["Ann Bell", "Bob Ray", "Oslo", "The Oslo Times", "Ann Bell", "Bob Ray"],
        "answers": ["Oslo Times", "ann bell!"],
        "idx": {"passage": 3, "query": 12},
    },
]


def test_record_fills_in_each_entity_once_in_order_of_first_mention():
    rows = list(record(RECORD))
    assert [row["entity"] for row in rows] == ENTITIES * 2
    assert [row["statement"] for row in rows] == [
        "It was Ann Bell who smiled at the camera",
        "It was Bob Ray who smiled at the camera",
        "It was Oslo who smiled at the camera",
        "It was The Oslo Times who smiled at the camera",
        "Ann Bell said so, and Ann Bell is believed",
        "Bob Ray said so, and Bob Ray is believed",
        "Oslo said so, and Oslo is believed",
        "The Oslo Times said so, and The Oslo Times is believed",
    ]
    assert [(row["passage_idx"], row["query_idx"]) for row in rows] == [(3, 11)] * 4 + [(3, 12)] * 4
    assert {row["passage"] for row in rows} == {TEXT}


def test_record_labels_candidates_by_the_metrics_normalisation():
    """Case, punctuation and articles are ignored; the answers are kept unchanged, without duplicates."""
    rows = list(record(RECORD))
    assert [row["label"] for row in rows] == [False, True, False, False, True, False, False, True]
    assert [row["answers"] for row in rows] == [["Bob Ray"]] * 4 + [["Oslo Times", "ann bell!"]] * 4


def test_record_of_the_hub_gives_the_same_rows():
    assert [row for flat in RECORD_FLAT for row in record(flat)] == list(record(RECORD))


@pytest.mark.parametrize("answers", [None, [], "absent"])
def test_record_without_answers_has_no_label(answers):
    nested, flat = copy.deepcopy(RECORD), copy.deepcopy(RECORD_FLAT)
    for query in nested["qas"] + flat:
        if answers == "absent":
            del query["answers"]
        else:
            query["answers"] = answers
    if answers is not None:  # the official test file has no key, or an empty list
        rows = list(record(nested))
        assert [(row["label"], row["answers"]) for row in rows] == [(None, [])] * 8
        assert [row["entity"] for row in rows] == ENTITIES * 2
    assert [(row["label"], row["answers"]) for one in flat for row in record(one)] == [(None, [])] * 8


def test_record_refuses_a_query_without_a_placeholder():
    for rows in (RECORD | {"qas": [RECORD["qas"][0] | {"query": "Who?"}]}, RECORD_FLAT[0] | {"query": "Who?"}):
        with pytest.raises(ValueError, match="'Who\\?' has no @placeholder"):
            list(record(rows))


def test_record_refuses_a_passage_without_entities():
    for entities in ([], [{"start": 3, "end": 3}], [{"start": 900, "end": 910}]):  # none, a space, beyond the end
        with pytest.raises(ValueError, match="no entities"):
            list(record(RECORD | {"passage": {"text": NEWS, "entities": entities}}))
    with pytest.raises(ValueError, match="no entities"):
        list(record(RECORD_FLAT[0] | {"entities": ["", " "]}))


@pytest.mark.parametrize(
    "passage, text",
    [
        ("One.", "One."),
        ("One", "One."),
        ("One.\n@highlight\nTwo\n@highlight\nThree", "One. Two. Three."),
        ('One!\n@highlight\n Two? \n@highlight\n\n@highlight\n"Three"', 'One! Two? "Three"'),
        ("@highlight\nTwo", "Two."),
        ("", ""),
    ],
)
def test_highlights_become_sentences(passage, text):
    assert highlights(passage) == text


# ------------------------------------------------------------------------------------------------------------- WSC


def marked(text, pronoun, index, **more):
    [row] = wsc({"text": text, "target": {"span2_text": pronoun, "span2_index": index, "span1_text": "Sam"} | more})
    assert row["noun"] == "Sam"
    return row["text"], row["pronoun"]


TWICE = "Sam said he knew that he could win, and he did."


@pytest.mark.parametrize(
    "text, pronoun, index, expected",
    [
        # the index counts words from 0; the occurrence nearest to it is marked
        (TWICE, "he", 2, "Sam said *he* knew that he could win, and he did."),
        (TWICE, "he", 5, "Sam said he knew that *he* could win, and he did."),
        (TWICE, "he", 9, "Sam said he knew that he could win, and *he* did."),
        (TWICE, "he", 4, "Sam said he knew that *he* could win, and he did."),
        (TWICE, "he", 0, "Sam said *he* knew that he could win, and he did."),
        (TWICE, "he", 40, "Sam said he knew that he could win, and *he* did."),
        ("It fell when it broke.", "it", 3, "It fell when *it* broke."),
        ("It fell when it broke.", "it", 0, "*It* fell when it broke."),
        ("It fell when it broke.", "It", 3, "It fell when *it* broke."),
        ("Ann saw him.", "him", 2, "Ann saw *him*."),
        ("Ann saw (him), I think.", "him", 2, "Ann saw (*him*), I think."),
        ("Ann knows he's late.", "he", 2, "Ann knows *he*'s late."),
        ("Ann knows he's late.", "he's", 2, "Ann knows *he's* late."),
        ("Ann knows he\u2019s late.", "he", 2, "Ann knows *he*\u2019s late."),
        ("She is here; the sheriff saw her.", "he", 4, None),
        ("The theme he hears is his.", "he", 2, "The theme *he* hears is his."),
        ("Ann  saw\n\nhim   and\thim again.", "him", 4, "Ann saw him and *him* again."),
        ("Ann saw him.", " him\n", 2, "Ann saw *him*."),
        ("Ann said that they themselves won.", "they themselves", 3, "Ann said that *they themselves* won."),
        ("No names here.", "it", 0, None),
        ("No names here.", "", 0, None),
        ("No names here.", " ", 0, None),
        ("", "it", 0, None),
        ("Was it a.b or a+b?", "a+b", 4, "Was it a.b or *a+b*?"),
        ("Was it aab?", "a.b", 2, None),
    ],
)
def test_wsc_marks_the_occurrence_at_the_index(text, pronoun, index, expected):
    if expected is None:
        with pytest.raises(ValueError, match="does not hold the pronoun"):
            marked(text, pronoun, index)
    else:
        assert marked(text, pronoun, index) == (expected, pronoun.strip())


def test_wsc_of_the_hub_gives_the_same_rows():
    spans = {"span1_index": 0, "span1_text": "Sam", "span2_index": 5, "span2_text": "he"}
    rest = {"text": TWICE, "idx": 4, "label": True}
    names = ("text", "pronoun", "noun", "idx", "label")
    found = [
        [{name: row[name] for name in names} for row in wsc(one)] for one in (rest | {"target": spans}, rest | spans)
    ]
    assert found[0] == found[1]
    assert found[0] == [
        {
            "text": "Sam said he knew that *he* could win, and he did.",
            "pronoun": "he",
            "noun": "Sam",
            "idx": 4,
            "label": True,
        }
    ]


# ------------------------------------------------------------------------------------------------------------ AX-g


def test_winogender_keeps_pair_ids_or_numbers_pairs():
    assert [row["pair_id"] for row in winogender({"idx": 5, "pair_id": 551})] == [551]
    assert [next(winogender({"idx": idx}))["pair_id"] for idx in (0, 1, 2, 3, "4", 355)] == [0, 0, 1, 1, 2, 177]
    assert list(winogender({"idx": 3, "premise": "p"})) == [{"idx": 3, "premise": "p", "pair_id": 1}]


# ----------------------------------------------------------------------------------------------- malformed objects

WSC = {
    "idx": 0,
    "label": False,
    "text": TWICE,
    "target": {"span1_index": 0, "span1_text": "Sam", "span2_index": 5, "span2_text": "he"},
}
NLI = {"premise": "It rained.", "hypothesis": "It was wet.", "idx": 0}
OBJECTS = {  # an object of each official file, and of the hub where that differs
    "boolq": [{"question": "is it", "passage": "It is.", "idx": 0, "label": True}],
    "cb": [NLI | {"label": "neutral"}],
    "copa": [{"premise": "A", "choice1": "B", "choice2": "C", "question": "cause", "idx": 0, "label": 1}],
    "multirc": [MULTIRC, MULTIRC_FLAT[0]],
    "record": [RECORD, RECORD_FLAT[0]],
    "superglue_rte": [NLI | {"label": "entailment"}],
    "wic": [{"word": "bank", "sentence1": "A bank.", "sentence2": "The bank.", "idx": 0, "label": False}],
    "wsc": [WSC, {k: v for k, v in WSC.items() if k != "target"} | WSC["target"]],
    "axb": [{"sentence1": "A", "sentence2": "B", "idx": "0", "label": "entailment", "logic": "Negation"}],
    "axg": [NLI | {"label": "entailment", "pair_id": 0}],
}


def test_every_jsonl_task_has_an_object_here():
    assert set(OBJECTS) == {task.name for task in SUITES["superglue"]}


def load_lines(folder, name, split, *lines):
    task = TASKS[name]
    path = folder / task.source.files[split]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return load_examples(task, split, str(folder))


@pytest.mark.parametrize("name", OBJECTS)
def test_the_objects_load(tmp_path, name):
    for split in TASKS[name].source.files:
        for one in OBJECTS[name]:
            assert load_lines(tmp_path, name, split, json.dumps(one))


# (task, replacement of the object, parts of the message)
BROKEN = [
    ("multirc", {}, ["MultiRC's format", "KeyError", "passage"]),
    ("multirc", {"passage": None, "idx": 0}, ["MultiRC's format", "TypeError"]),
    ("multirc", {"passage": "text", "idx": 0}, ["MultiRC's format", "TypeError"]),
    ("multirc", MULTIRC | {"passage": {"text": "t"}}, ["MultiRC's format", "questions"]),
    ("multirc", MULTIRC | {"passage": {"text": "t", "questions": [None]}}, ["MultiRC's format", "TypeError"]),
    ("multirc", MULTIRC | {"passage": {"questions": MULTIRC["passage"]["questions"]}}, ["'text'"]),
    ("multirc", MULTIRC_FLAT[0] | {"idx": 0}, ["MultiRC's format"]),
    ("multirc", MULTIRC_FLAT[0] | {"label": None}, ["'label'", "'None'", "multirc"]),
    ("multirc", MULTIRC_FLAT[0] | {"label": 2}, ["'label'", "'2'", "'1', '0'", "multirc"]),
    ("multirc", MULTIRC_FLAT[0] | {"answer": 5}, ["'answer'", "expected text, got 5"]),
    ("multirc", MULTIRC_FLAT[0] | {"answer": ["Mia"]}, ["'answer'", "expected text"]),
    ("multirc", MULTIRC_FLAT[0] | {"answer": "\ud800"}, ["'answer'", "surrogate"]),
    ("record", RECORD | {"qas": None}, ["ReCoRD's format"]),
    ("record", RECORD | {"qas": [{"idx": 1, "answers": []}]}, ["ReCoRD's format", "query"]),
    ("record", RECORD | {"passage": {"text": NEWS, "entities": []}}, ["ReCoRD's format", "no entities"]),
    ("record", RECORD | {"passage": {"text": NEWS, "entities": [{"start": 1}]}}, ["ReCoRD's format", "end"]),
    ("record", RECORD | {"passage": {"text": NEWS, "entities": [{"start": "0", "end": 4}]}}, ["ReCoRD's format"]),
    ("record", RECORD_FLAT[0] | {"query": "No hole"}, ["ReCoRD's format", "@placeholder"]),
    ("record", RECORD_FLAT[0] | {"query": ["@placeholder"]}, ["ReCoRD's format"]),
    ("record", RECORD_FLAT[0] | {"entities": [1]}, ["ReCoRD's format"]),
    ("record", RECORD_FLAT[0] | {"entities": None}, ["ReCoRD's format"]),
    ("record", RECORD_FLAT[0] | {"answers": [None]}, ["ReCoRD's format"]),
    ("record", RECORD_FLAT[0] | {"answers": []}, ["'label'", "'None'", "record"]),
    ("record", RECORD_FLAT[0] | {"passage": 5}, ["ReCoRD's format"]),
    ("wsc", WSC | {"target": None}, ["WSC's format"]),
    ("wsc", WSC | {"target": {}}, ["WSC's format", "span2_text"]),
    ("wsc", WSC | {"text": None}, ["WSC's format"]),
    ("wsc", WSC | {"text": "No pronoun"}, ["WSC's format", "does not hold the pronoun 'he'"]),
    ("wsc", WSC | {"target": WSC["target"] | {"span2_index": "5"}}, ["WSC's format"]),
    ("wsc", WSC | {"target": WSC["target"] | {"span1_text": None}}, ["'noun'", "expected text, got None"]),
    ("wsc", {k: v for k, v in WSC.items() if k != "label"}, ["no field 'label'"]),
    ("wsc", WSC | {"label": "True"}, ["'label'", "'True'", "wsc"]),
    ("axg", NLI | {"idx": None, "label": "entailment"}, ["AX-g's format"]),
    ("axg", NLI | {"idx": "first", "label": "entailment"}, ["AX-g's format"]),
    ("axg", NLI | {"idx": float("inf"), "label": "entailment"}, ["AX-g's format"]),
    ("axg", {"premise": "a", "hypothesis": "b", "label": "entailment"}, ["AX-g's format", "idx"]),
    ("axg", NLI | {"label": "neutral", "pair_id": 0}, ["'label'", "'neutral'", "axg"]),
]


@pytest.mark.parametrize("name, broken, parts", BROKEN)
def test_a_malformed_object_is_named_with_file_line_and_task(tmp_path, name, broken, parts):
    split = "test" if name == "axg" else "validation"
    good = json.dumps(OBJECTS[name][0])
    with pytest.raises(UserError) as caught:
        load_lines(tmp_path, name, split, good, "", json.dumps(broken))
    for part in (str(tmp_path / TASKS[name].source.files[split]), "line 3", *parts):
        assert part in str(caught.value)


def places(value, path=()):
    """The paths of all values inside `value`."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield (*path, key)
        yield from places(one, (*path, key))


JUNK = [None, True, False, 0, -1, 1.5, float("inf"), float("nan"), 10**30, "", " ", "x", "5", "@placeholder", "\ud800"]
JUNK += [[], [[]], [None], ["x"], {}, {"x": 1}, {"text": "x"}, {"start": 0, "end": -1}]
DROP = "(drop)"


@st.composite
def mutated(draw, names=tuple(OBJECTS)):
    """A task, one of its objects with up to three keys dropped or values replaced, and a split."""
    name = draw(st.sampled_from(names))
    one = copy.deepcopy(draw(st.sampled_from(OBJECTS[name])))
    for _ in range(draw(st.integers(1, 3))):
        paths = list(places(one))
        if not paths:
            break
        *parents, last = draw(st.sampled_from(paths))
        other = one
        for step in draw(st.sampled_from(paths)):
            other = other[step]
        value = copy.deepcopy(draw(st.sampled_from([DROP, DROP, other, *JUNK])))
        place = one
        for step in parents:
            place = place[step]
        if value == DROP:
            del place[last]
        else:
            place[last] = value
    return name, one, draw(st.sampled_from(sorted(TASKS[name].source.files)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mutated")


@pytest.mark.slow
@settings(max_examples=600)
@given(mutated())
@case(("axg", NLI | {"idx": float("inf"), "label": "entailment"}, "test"))
@case(("multirc", MULTIRC_FLAT[0] | {"paragraph": "", "answer": "\ud800"}, "validation"))
@case(("multirc", MULTIRC_FLAT[0] | {"answer": 5}, "test"))
def test_a_mutated_object_loads_or_is_a_user_error(folder, drawn):
    name, one, split = drawn
    task, first = TASKS[name], json.dumps(OBJECTS[name][0])
    try:
        examples = load_lines(folder, name, split, first, json.dumps(one))
    except UserError as error:
        assert f"{folder / task.source.files[split]}, line 2" in str(error)
        return
    may_lack = task.source.incomplete == "skip"
    for example in examples:
        assert tuple(example.fields) == task.fields
        for text in example.fields.values():
            assert isinstance(text, str) and (text.strip() or may_lack)
            text.encode()  # raises for half of a surrogate pair
        assert example.label in task.labels or (example.label is None and split in task.source.unlabelled)


NAMES = {"multirc": multirc, "record": record, "wsc": wsc, "axg": winogender}


@pytest.mark.slow
@settings(max_examples=600)
@given(mutated(tuple(NAMES)))
def test_row_functions_raise_only_documented_errors(drawn):
    name, one, _ = drawn
    try:
        rows = list(NAMES[name](one))
    except MALFORMED:
        return
    assert all({*TASKS[name].source.keep.values()} - {"idx"} <= row.keys() for row in rows)
