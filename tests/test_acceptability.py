import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from extensions.acceptability import PHENOMENA, SIZES, generate

ROWS = {split: generate(split) for split in SIZES}

# Written down here, not taken from the generator: all that the splits may share.
FUNCTION_WORDS = """
    a an the this these those every each one two many several last
    i me he him she her we us they them
    is are was were has have do does did not can will must should to
    at in on near behind about for very already often
"""
# Irregular forms to their lemma, so that "wrote" in one split and "writes" in another would be found out.
IRREGULAR = """
    wrote/write written/write bought/buy sold/sell ate/eat eaten/eat broke/break broken/break stole/steal
    stolen/steal drew/draw drawn/draw threw/throw thrown/throw lost/lose found/find made/make slept/sleep fell/fall
    met/meet sat/sit went/go wore/wear worn/wear hid/hide hidden/hide wept/weep knelt/kneel
    took/take taken/take rode/ride ridden/ride chose/choose chosen/choose grew/grow grown/grow shook/shake
    shaken/shake brought/bring children/child women/woman men/man policemen/policeman thieves/thief wives/wife
    scarves/scarf shelves/shelf
"""
LEMMAS = dict(pair.split("/") for pair in IRREGULAR.split())


def words(text):
    return re.findall(r"[a-z]+", text.lower())


def stem(word):
    """Crude on purpose: "baker" and "baked" meet, so do "visits" and "visitor"."""
    word = LEMMAS.get(word, word)
    for ending in ("ing", "ies", "ied", "ers", "ors", "es", "ed", "er", "or", "s", "e", "y"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word.removesuffix(ending)
            break
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


def pairs(rows):
    found = defaultdict(dict)
    for row in rows:
        assert row["label"] not in found[row["pair"]]
        found[row["pair"]][row["label"]] = row
    return list(found.values())


def test_content_words_of_the_splits_are_disjoint():
    content = {
        split: {stem(word) for row in rows for word in words(row["sentence"]) if word not in FUNCTION_WORDS.split()}
        for split, rows in ROWS.items()
    }
    assert len(content["train"]) > 140 and len(content["test"]) > 100 and len(content["validation"]) > 60
    assert not content["train"] & content["test"]
    assert not content["train"] & content["validation"]
    assert not content["validation"] & content["test"]


@pytest.mark.parametrize(
    "word, other", [("wrote", "writes"), ("baker", "baking"), ("planned", "plan"), ("thieves", "thief")]
)
def test_the_stems_of_a_lemma_meet(word, other):
    assert stem(word) == stem(other)


@pytest.mark.parametrize("split", SIZES)
def test_rows(split):
    rows = ROWS[split]
    assert len(rows) == SIZES[split]
    assert all(set(row) == {"sentence", "label", "phenomenon", "pair"} for row in rows)
    assert Counter(row["label"] for row in rows) == {"1": SIZES[split] // 2, "0": SIZES[split] // 2}
    each = Counter(row["phenomenon"] for row in rows if row["label"] == "1")
    assert set(each) == set(PHENOMENA) and max(each.values()) - min(each.values()) <= 1
    for row in rows:
        assert re.fullmatch(r"[A-Z][A-Za-z]*( [A-Za-z]+)+\.", row["sentence"]), row
        assert 5 <= len(row["sentence"].split()) <= 12, row


def test_no_sentence_occurs_twice():
    sentences = [row["sentence"].lower() for rows in ROWS.values() for row in rows]
    assert len(set(sentences)) == len(sentences)


@pytest.mark.parametrize("split", SIZES)
def test_pairs_are_one_small_edit_apart(split):
    for pair in pairs(ROWS[split]):
        good, bad = (words(pair[label]["sentence"]) for label in "10")
        assert pair["1"]["phenomenon"] == pair["0"]["phenomenon"]
        while good and bad and good[0] == bad[0]:
            good, bad = good[1:], bad[1:]
        while good and bad and good[-1] == bad[-1]:
            good, bad = good[:-1], bad[:-1]
        one_word = len(good) == 1 and len(bad) == 1
        added = not good and len(bad) <= 2  # "slept the letter", "the the"
        left_out = not bad and len(good) == 1
        moved = sorted(good) == sorted(bad) and len(good) <= 3
        assert one_word or added or left_out or moved, pair


@pytest.mark.parametrize("split", SIZES)
def test_a_pair_has_both_members_and_its_own_id(split):
    assert all(set(pair) == {"0", "1"} for pair in pairs(ROWS[split]))
    assert all(pair["1"]["pair"].startswith(split) for pair in pairs(ROWS[split]))


def test_articles_suit_the_next_word():
    for row in (row for rows in ROWS.values() for row in rows if row["label"] == "1"):
        for article, word in re.findall(r"\b(an?) (\w)", row["sentence"].lower()):
            assert (article == "an") == (word in "aeiou"), row


def test_same_seed_same_rows_in_another_process():
    code = "from extensions.acceptability import generate; print(generate('test', 3))"
    root = Path(__file__).parents[1]
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        out = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, check=True)
        assert out.stdout.decode().strip() == str(generate("test", 3))
    assert generate("test", 3) != generate("test", 4)


def test_unknown_split_names_the_allowed_ones():
    with pytest.raises(ValueError, match=r"'dev'.*train, validation, test"):
        generate("dev")
