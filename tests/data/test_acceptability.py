import pytest
from support import pairs, words

from extensions.data.generated.acceptability import generate
from extensions.data.generated.pairs import SIZES

ROWS = {split: generate(split) for split in SIZES}

# Independent of the generator: all words that the splits may share.
FUNCTION_WORDS = """
    a an the this these those every each one two many several last
    i me he him she her we us they them
    is are was were has have do does did not can will must should to
    at in on near behind about for very already often
"""
# Irregular forms to their lemma, so that "wrote" in one split and "writes" in another are detected.
IRREGULAR = """
    wrote/write written/write bought/buy sold/sell ate/eat eaten/eat broke/break broken/break stole/steal
    stolen/steal drew/draw drawn/draw threw/throw thrown/throw lost/lose found/find made/make slept/sleep fell/fall
    met/meet sat/sit went/go wore/wear worn/wear hid/hide hidden/hide wept/weep knelt/kneel
    took/take taken/take rode/ride ridden/ride chose/choose chosen/choose grew/grow grown/grow shook/shake
    shaken/shake brought/bring children/child women/woman men/man policemen/policeman thieves/thief wives/wife
    scarves/scarf shelves/shelf
"""
LEMMAS = dict(pair.split("/") for pair in IRREGULAR.split())


def stem(word):
    """Deliberately crude: "baker" and "baked" have one stem, and so do "visits" and "visitor"."""
    word = LEMMAS.get(word, word)
    for ending in ("ing", "ies", "ied", "ers", "ors", "es", "ed", "er", "or", "s", "e", "y"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word.removesuffix(ending)
            break
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


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
def test_forms_of_a_lemma_have_one_stem(word, other):
    assert stem(word) == stem(other)


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
