"""Linguistic acceptability, a task like CoLA, from templates; nothing to download.

Each pair is an acceptable and an unacceptable sentence that differ in one small edit. The splits share only function
words: their nouns, verbs, adjectives and names are disjoint, so accuracy measures generalisation.

    python -c "from extensions.data.generated.acceptability import generate; print(generate('test')[0])"
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from extensions.data.generated import pairs
from extensions.data.generated.pairs import Pair, article, minimal_pair


class Noun(NamedTuple):
    singular: str
    plural: str


class Verb(NamedTuple):
    base: str
    past: str
    participle: str

    @property
    def ing(self) -> str:
        return self.base.removesuffix("e") + "ing"


def with_s(word: str) -> str:
    """Plural of a noun, third person of a verb."""
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    return word[:-1] + "ies" if word.endswith("y") and word[-2] not in "aeiou" else word + "s"


def inflect_noun(entry: str) -> Noun:
    """The forms of "teacher", or of "child/children"."""
    singular, _, plural = entry.partition("/")
    return Noun(singular, plural or with_s(singular))


def inflect_verb(entry: str) -> Verb:
    """The forms of "open", or of "write/wrote/written"."""
    base, *irregular = entry.split("/")
    past = base + "d" if base.endswith("e") else base[:-1] + "ied" if with_s(base).endswith("ies") else base + "ed"
    return Verb(base, *(irregular or (past, past)))


class AcceptabilityWords(pairs.Words):
    def action(self) -> tuple[Verb, Noun]:
        """A verb and an object that suits it."""
        verb, *objects = self.one("actions").split()
        return inflect_verb(verb), inflect_noun(self.pick(*objects))

    def the_or_a(self, noun: str) -> str:
        return self.pick("the " + noun, article(noun))

    def person(self) -> str:
        """A noun phrase in the singular: "the tall farmer", "the farmer", "Mary"."""
        kind = self.pick("name", "noun", "adjective")
        if kind == "name":
            return self.one("names")
        adjective = self.one("adjectives") if kind == "adjective" else ""
        return f"the {adjective} {inflect_noun(self.one('people')).singular}"

    def modal(self) -> str:
        return self.pick("can", "will", "must", "should")


# Each phenomenon draws its words in a fixed order, including words that its template may not use: another order of
# draws would give other rows.


def agreement(words: AcceptabilityWords) -> Pair:
    """The farmers are / *is painting the wall now."""
    who, (does, what) = inflect_noun(words.one("people")), words.action()
    thing, adjective = words.the_or_a(what.singular), words.one("adjectives")
    singular, plural, rest = words.pick(
        ("is", "are", f"{does.ing} {thing} {words.one('places')}"),
        ("was", "were", f"very {adjective} {words.one('times')}"),
        ("has", "have", f"already {does.participle} {thing}"),
        ("does", "do", f"not {does.base} {thing} very often"),
    )
    subject = words.pick(f"{who.singular} [{singular}/{plural}]", f"{who.plural} [{plural}/{singular}]")
    return minimal_pair(f"the {subject} {rest}")


def determiner(words: AcceptabilityWords) -> Pair:
    """Mary painted these walls / *wall last week."""
    does, what = words.action()
    things = words.pick(
        words.pick("this", "every", "each", "one") + f" [{what.singular}/{what.plural}]",
        words.pick("these", "those", "many", "several", "two") + f" [{what.plural}/{what.singular}]",
    )
    return minimal_pair(f"{words.person()} {does.past} {things} {words.one('times')}")


def verb_form(words: AcceptabilityWords) -> Pair:
    """John has already painted / *paint the wall."""
    does, what = words.action()
    third = with_s(does.base)
    auxiliary, right, wrong = words.pick(
        ("has already", does.participle, (does.base, third, does.ing)),
        ("is", does.ing, (does.base, third)),
        (words.modal(), does.base, (third, does.past, does.ing)),
        ("did not", does.base, (third, does.past, does.ing)),
    )
    person, thing = words.person(), words.the_or_a(what.singular)
    return minimal_pair(f"{person} {auxiliary} [{right}/{words.pick(*wrong)}] {thing}")


def argument(words: AcceptabilityWords) -> Pair:
    """Mary slept (*the letter) in the park last week. Mary wrote / *slept the letter in the park last week."""
    person, place, time = words.person(), words.one("places"), words.one("times")
    sleeps, (does, what) = inflect_verb(words.one("no_object")), words.action()
    thing = words.the_or_a(what.singular)
    right = words.pick(sleeps.past, f"{does.past} {thing}")
    return minimal_pair(f"{person} [{right}/{sleeps.past} {thing}] {place} {time}")


def pronoun_case(words: AcceptabilityWords) -> Pair:
    """He / *him did not paint the wall last week. Mary thanked him / *he last week."""
    subject, object_ = words.pick(("I", "me"), ("he", "him"), ("she", "her"), ("we", "us"), ("they", "them"))
    time = words.one("times")
    if words.rng.random() < 0.5:
        does, what = words.action()
        return minimal_pair(f"[{subject}/{object_}] did not {does.base} {words.the_or_a(what.singular)} {time}")
    return minimal_pair(f"{words.person()} {inflect_verb(words.one('addresses')).past} [{object_}/{subject}] {time}")


def word_order(words: AcceptabilityWords) -> Pair:
    """Mary painted the wall / *the wall painted / *painted wall the last week."""
    person, (does, what) = words.person(), words.action()
    thing, time, modal, place = words.the_or_a(what.singular), words.one("times"), words.modal(), words.one("places")
    rest = words.pick(
        f"[{does.past} {thing}/{thing} {does.past}] {time}",
        f"{does.past} [{thing}/{_reversed(thing)}] {time}",
        f"[{modal} {does.base}/{does.base} {modal}] {thing} {place}",
        f"{does.past} {thing} [{place}/{_reversed(place)}]",
    )
    return minimal_pair(f"{person} {rest}")


def _reversed(phrase: str) -> str:
    return " ".join(reversed(phrase.split()))


def function_word(words: AcceptabilityWords) -> Pair:
    """Mary looked (at) the map; wanted (to) paint the wall; must (*to) paint the wall; painted the (*the) wall."""
    person, time = words.person(), words.one("times")
    looks, at, *objects = words.one("with_preposition").split()
    wants, (does, what) = inflect_verb(words.one("with_infinitive")), words.action()
    thing, target = words.the_or_a(what.singular), inflect_noun(words.pick(*objects)).singular
    rest = words.pick(
        f"{inflect_verb(looks).past} [{at}/] the {target} {time}",
        f"{wants.past} [to/] {does.base} {thing}",
        f"{words.modal()} [/to] {does.base} {thing}",
        f"{does.past} the [/the] {what.singular} {time}",
    )
    return minimal_pair(f"{person} {rest}")


PHENOMENA: dict[str, Callable[[AcceptabilityWords], Pair]] = {
    one.__name__: one for one in (agreement, determiner, verb_form, argument, pronoun_case, word_order, function_word)
}
generate = partial(pairs.generate, "acceptability", AcceptabilityWords, PHENOMENA)
