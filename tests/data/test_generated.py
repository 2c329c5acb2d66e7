"""Properties of every generated task: balance, pairs, no repetition, reproducible rows."""

import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from support import ROOT

from extensions.data.generated import GENERATORS
from extensions.data.generated.pairs import SIZES

WORDS = {"acceptability": (5, 12), "reviews": (6, 16)}  # minimum and maximum words per sentence
EACH = [(task, split) for task in GENERATORS for split in SIZES]


@pytest.mark.parametrize(("task", "split"), EACH)
def test_rows(task, split):
    rows = GENERATORS[task](split)
    assert len(rows) == SIZES[split]
    assert all(set(row) == {"sentence", "label", "phenomenon", "pair"} for row in rows)
    assert Counter(row["label"] for row in rows) == {"1": SIZES[split] // 2, "0": SIZES[split] // 2}
    each = Counter(row["phenomenon"] for row in rows if row["label"] == "1")
    assert len(each) > 5 and max(each.values()) - min(each.values()) <= 1
    fewest, most = WORDS[task]
    for row in rows:
        assert re.fullmatch(r"[A-Z][A-Za-z]*(,? [A-Za-z]+)+\.", row["sentence"]), row
        assert fewest <= len(row["sentence"].split()) <= most, row


@pytest.mark.parametrize(("task", "split"), EACH)
def test_a_pair_has_both_members_and_its_own_id(task, split):
    members = {}
    for row in GENERATORS[task](split):
        members.setdefault(row["pair"], []).append(row)
    assert len(members) == SIZES[split] // 2 and all(pair.startswith(split) for pair in members)
    assert all(sorted(row["label"] for row in rows) == ["0", "1"] for rows in members.values())
    assert all(rows[0]["phenomenon"] == rows[1]["phenomenon"] for rows in members.values())


@pytest.mark.parametrize("task", GENERATORS)
def test_no_sentence_occurs_twice(task):
    sentences = [row["sentence"].lower() for split in SIZES for row in GENERATORS[task](split)]
    assert len(set(sentences)) == len(sentences)


@pytest.mark.parametrize("task", GENERATORS)
def test_articles_suit_the_next_word(task):
    rows = [row for split in SIZES for row in GENERATORS[task](split) if task != "acceptability" or row["label"] == "1"]
    for row in rows:
        for article, word in re.findall(r"\b(an?) (\w)", row["sentence"].lower()):
            assert (article == "an") == (word in "aeiou"), row


@pytest.mark.parametrize("task", GENERATORS)
def test_same_seed_same_rows_in_another_process(task):
    code = f"from extensions.data.generated import GENERATORS; print(GENERATORS[{task!r}]('test', 3))"
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
        assert out.stdout.decode().strip() == str(GENERATORS[task]("test", 3))
    assert GENERATORS[task]("test", 3) != GENERATORS[task]("test", 4)


@pytest.mark.parametrize("task", GENERATORS)
@pytest.mark.parametrize("seed", range(1, 4))
def test_every_seed_finds_enough_sentences(task, seed):
    assert all(len(GENERATORS[task](split, seed)) == SIZES[split] for split in SIZES)


@pytest.mark.parametrize("task", GENERATORS)
def test_unknown_split_names_the_allowed_ones(task):
    with pytest.raises(ValueError, match=r"'dev'.*train, validation, test"):
        GENERATORS[task]("dev")
