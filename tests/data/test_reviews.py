from difflib import SequenceMatcher

import pytest
from support import pairs, words

from extensions.data.generated.pairs import SIZES
from extensions.data.generated.reviews import PHENOMENA, generate

ROWS = {split: generate(split) for split in SIZES}

# Independent of the generator: all words that the splits may share.
FUNCTION_WORDS = """
    a an the this i me my we us our you it all none everything everyone anyone what such
    was is were be would will should can cannot not never and but so if that still also only nothing
    at in of on to with by about for from as whole again very really truly absolutely simply real true
"""
TOPICS = """
    restaurant hotel film novel laptop tour food waiter dessert room bed receptionist breakfast plot acting dialogue
    story style ending screen battery keyboard driver bus route bakery podcast scooter campsite bread cashier host
    interview brake saddle shower owner cafe concert museum jacket phone flight coffee cake barista singer sound band
    guide guard exhibition fabric zipper color camera speaker software crew seat meal
"""
IRREGULAR = "thought/think spent/spend chosen/choose ate/eat read/read wore/wear bought/buy sold/sell children/child"
LEMMAS = dict(pair.split("/") for pair in IRREGULAR.split())
# Kinds in which a sentiment word has the polarity of its review.
DIRECT = set(PHENOMENA) - {"negated", "contrast", "advice"}


def stem(word):
    """Deliberately crude: "enjoyed" and "enjoyable" have one stem, and so do "unfriendly" and "friend"."""
    word = LEMMAS.get(word, word)
    word = word.removeprefix("un") if len(word) > 6 else word
    for ending in (
        *("fulness", "fully", "ments", "ingly", "able", "ably", "ment", "ness", "ful", "ing", "ies", "ied", "ily"),
        *("ers", "ors", "ly", "es", "ed", "er", "or", "s", "e", "y"),
    ):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word.removesuffix(ending)
            break
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


def edits(pair):
    """The spans in which the positive and the negative member differ."""
    good, bad = (words(pair[label]["sentence"]) for label in "10")
    codes = SequenceMatcher(None, good, bad, autojunk=False).get_opcodes()
    return [(good[a:b], bad[c:d]) for tag, a, b, c, d in codes if tag != "equal"]


def polarity(split):
    """Label -> content words of the differing spans, in members with this label of pairs of the direct kinds."""
    sides = {"1": set(), "0": set()}
    for pair in (pair for seed in range(10) for pair in pairs(generate(split, seed))):
        if pair["1"]["phenomenon"] in DIRECT:
            for good, bad in edits(pair):
                sides["1"].update(good)
                sides["0"].update(bad)
    return {label: side - set(FUNCTION_WORDS.split()) for label, side in sides.items()}


def test_content_words_of_the_splits_are_disjoint():
    content = {
        split: {stem(word) for row in rows for word in words(row["sentence"]) if word not in FUNCTION_WORDS.split()}
        for split, rows in ROWS.items()
    }
    assert len(content["train"]) > 110 and len(content["test"]) > 110 and len(content["validation"]) > 60
    assert not content["train"] & content["test"]
    assert not content["train"] & content["validation"]
    assert not content["validation"] & content["test"]


@pytest.mark.parametrize(
    "word, other",
    [
        ("enjoyed", "enjoyable"),
        ("unfriendly", "friend"),
        ("disappointing", "disappointment"),
        ("delight", "delightful"),
    ],
)
def test_words_of_a_family_have_one_stem(word, other):
    assert stem(word) == stem(other)


@pytest.mark.parametrize("split", SIZES)
def test_members_of_a_pair_differ_in_sentiment_only(split):
    for pair in pairs(ROWS[split]):
        kind, changed = pair["1"]["phenomenon"], edits(pair)
        assert kind == pair["0"]["phenomenon"]
        assert 1 <= len(changed) <= (2 if kind in ("contrast", "two_aspects") else 1), pair
        for good, bad in changed:
            assert max(len(good), len(bad)) <= 4, pair
            assert not {*good, *bad} & set(TOPICS.split()), pair


@pytest.mark.parametrize("split", SIZES)
def test_words_of_sentiment_keep_their_polarity(split):
    side = polarity(split)
    assert not side["1"] & side["0"]
    for row in ROWS[split]:
        said, other = side[row["label"]], side["01"[row["label"] == "0"]]
        if row["phenomenon"] in DIRECT:
            assert said & {*words(row["sentence"])} and not other & {*words(row["sentence"])}, row
        if row["phenomenon"] == "contrast":
            first, last = map(words, row["sentence"].split(", but "))
            assert other & {*first} and not said & {*first}, row
            assert said & {*last} and not other & {*last}, row


@pytest.mark.parametrize("split", SIZES)
def test_negation_reverses_the_label(split):
    side, turned = polarity(split), 0
    for row in (row for row in ROWS[split] if row["phenomenon"] == "negated"):
        said = words(row["sentence"])
        if said[0] in ("all", "none"):  # of us liked it
            assert (row["label"] == "1") == (said[0] == "all"), row
        else:
            assert bool(side["1"] & {*said}) != bool(side["0"] & {*said}), row
            assert (row["label"] == "1") == (bool(side["1"] & {*said}) == ("not" not in said)), row
        turned += "not" in said or "none" in said
    assert turned > SIZES[split] // 8 // 3  # of each kind's eighth
