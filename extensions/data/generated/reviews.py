"""Sentiment of short reviews, a task like SST-2, from templates; nothing to download.

Each pair is a positive and a negative review that differ only in sentiment words or in negation. The splits share only
function words and intensifiers: their topics, aspects and sentiment words are disjoint, so accuracy measures
generalisation.

    python -c "from extensions.data.generated.reviews import generate; print(generate('test')[0])"
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from extensions.data.generated import pairs
from extensions.data.generated.pairs import Pair, article, minimal_pair

INTENSIFIERS = ("really", "truly", "absolutely", "simply")  # shared by the splits; they suit every adjective of a thing


class Topic(NamedTuple):
    thing: str
    preposition: str
    does: str
    aspects: dict[str, str]  # aspect -> adjectives / adjectives

    def of(self, aspect: str) -> str:
        return f"the {aspect} {self.preposition} this {self.thing}"


class ReviewWords(pairs.Words):
    def topic(self) -> Topic:
        return Topic(**self.one("topics"))

    def aspect(self, topic: Topic) -> tuple[str, str]:
        """An aspect and its adjectives."""
        return self.pick(*topic.aspects.items())

    def either(self, entries: str) -> Pair:
        """A positive and a negative word: one before the slash and one after it, separated by bars or by spaces."""
        good, bad = (side.strip().split("|" if "|" in entries else None) for side in entries.split("/"))
        return self.pick(*good), self.pick(*bad)

    def we(self) -> str:
        """A subject, always in the plural."""
        return f"my {self.one('people')} and I" if self.rng.random() < 0.8 else "we"


# Each kind of review draws its words in a fixed order, including words that its template may not use: another order of
# draws would give other rows.


def plain(words: ReviewWords) -> Pair:
    """In my opinion, this was a lovely / terrible hotel. I think that the food in this restaurant was tasty / bland."""
    topic, opener = words.topic(), words.one("openers")
    if words.rng.random() < 0.5:
        good, bad = map(article, words.either(words.entries["adjectives"]))
        return minimal_pair(f"{opener} this was [{good}/{bad}] {topic.thing}")
    aspect, adjectives = words.aspect(topic)
    good, bad = words.either(adjectives)
    return minimal_pair(f"{opener} {topic.of(aspect)} was [{good}/{bad}]")


def intensified(words: ReviewWords) -> Pair:
    """Everything about this film was really brilliant / awful. The room in this hotel was absolutely lovely / awful."""
    topic, very = words.topic(), words.pick(*INTENSIFIERS)
    good, bad = words.either(words.entries["adjectives"])
    return minimal_pair(
        words.pick(
            f"everything about this {topic.thing} was {very} [{good}/{bad}]",
            f"what {article(very)} [{good}/{bad}] {topic.thing} this was",
            f"{topic.of(words.pick(*topic.aspects))} was {very} [{good}/{bad}]",
        )
    )


def negated(words: ReviewWords) -> Pair:
    """The waiter was not rude / polite at all. The room was very / not at all clean. All / none of us liked it."""
    topic = words.topic()
    aspect, adjectives = words.aspect(topic)
    good, bad = words.either(adjectives)
    subject = words.pick("", words.one("openers")) + " " + topic.of(aspect)
    return minimal_pair(
        words.pick(
            f"{subject} was not [{bad}/{good}] at all",
            f"{subject} was [very/not at all] {good}",
            f"{subject} was [not at all/very] {bad}",
            f"[all/none] of us {words.one('likings')} {topic.of(aspect)}",
        )
    )


def contrast(words: ReviewWords) -> Pair:
    """The food was bland / tasty, but all in all this was a lovely / terrible restaurant: the last clause decides."""
    topic, (good, bad) = words.topic(), words.either(words.entries["adjectives"])
    aspect, adjectives = words.aspect(topic)
    verdict = words.pick(
        f"all in all this was [{article(good)}/{article(bad)}] {topic.thing}",
        f"this {topic.thing} as a whole was {words.pick(*INTENSIFIERS)} [{good}/{bad}]",
        "we still [{}/{}] this {}".format(*words.either(words.entries["verbs"]), topic.thing),
    )
    good, bad = words.either(adjectives)
    return minimal_pair(f"the {aspect} was [{bad}/{good}], but {verdict}")


def advice(words: ReviewWords) -> Pair:
    """My wife and I would gladly / never stay in this hotel again. I can / cannot recommend it to anyone."""
    topic, template = words.topic(), words.one("advice")
    return minimal_pair(
        template.format(who=words.we(), opener=words.one("openers"), thing=topic.thing, does=topic.does)
    )


def two_aspects(words: ReviewWords) -> Pair:
    """The food in this restaurant was tasty / bland and the waiter was polite / rude."""
    topic = words.topic()
    (first, its), (second, others) = words.rng.sample(list(topic.aspects.items()), 2)
    template = words.pick(
        f"{topic.of(first)} was {{}} and the {second} was {{}}",
        f"the {first} was {{}} and {topic.of(second)} was also {{}}",
        f"not only was {topic.of(first)} {{}}, the {second} was also {{}}",
    )
    return minimal_pair(template.format(*("[{}/{}]".format(*words.either(one)) for one in (its, others))))


def feeling(words: ReviewWords) -> Pair:
    """My parents and I loved / hated the plot of this film."""
    topic, really = words.topic(), words.pick("", "really", "truly")
    what = words.pick(*map(topic.of, topic.aspects), f"everything about this {topic.thing}")
    who = words.we()
    good, bad = words.either(words.entries["verbs"])
    return minimal_pair(f"{who} {really} [{good}/{bad}] {what}")


def verdict(words: ReviewWords) -> Pair:
    """For my wife and me, this film was nothing but a joy / nightmare."""
    topic, (good, bad) = words.topic(), words.either(words.entries["nouns"])
    real = words.pick("", "real ", "true ")
    whom = re.sub("I$", "me", words.we()).replace("we", "us")
    what = f"[{article(real + good)}/{article(real + bad)}]"
    return minimal_pair(
        words.pick(
            f"for {whom}, this {topic.thing} was nothing but {what}",
            f"{words.one('openers')} this {topic.thing} was {what}",
            f"this {topic.thing} was {what} for {whom}",
        )
    )


PHENOMENA: dict[str, Callable[[ReviewWords], Pair]] = {
    one.__name__: one for one in (plain, intensified, negated, contrast, advice, two_aspects, feeling, verdict)
}
generate = partial(pairs.generate, "reviews", ReviewWords, PHENOMENA)
