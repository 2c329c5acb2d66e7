"""Linguistic acceptability (a task like CoLA) from templates: nothing to download.

Every pair is an acceptable sentence and an unacceptable one, one small edit apart. The splits share function
words only: nouns, verbs, adjectives and names of one never occur in another, so accuracy means generalisation.

    python -c "from extensions.data.generated.acceptability import generate; print(generate('test')[0])"
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from extensions.data.generated import pairs
from extensions.data.generated.pairs import Pair, Row

# ---------------------------------------------------------------------------------------------------------------
# Lexicon. "child/children" spells an irregular plural, "write/wrote/written" an irregular past and participle.
# No verb may have a past or a participle that equals its base ("put", "come"), nor a noun a plural that equals its
# singular ("sheep"): the edits below would leave such a sentence acceptable. Verbs of actions do not double their
# last consonant ("cutting").
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AcceptabilityLexicon:
    people: str
    names: str
    adjectives: str  # that fit any person
    actions: str  # a line each: a transitive verb, then objects that suit it
    addresses: str  # verbs with a person as object, none of which takes a clause ("saw", "knew")
    no_object: str  # verbs that never take an object
    with_preposition: str  # a line each: verb, preposition, then objects; never without the preposition
    with_infinitive: str  # verbs that take "to" and a verb
    places: str
    times: str  # when something happened


TRAIN = AcceptabilityLexicon(
    people="teacher farmer student doctor neighbor artist lawyer soldier tourist baker guest manager driver singer "
    "child/children pilot engineer worker captain dancer writer girl woman/women mother aunt sister "
    "grandmother actress boy man/men father uncle brother grandfather policeman/policemen",
    names="Mary Anna Susan Linda Emily Karen Laura Julia John Peter David Robert Thomas Kevin Paul Daniel",
    adjectives="tall young friendly tired clever quiet angry famous nervous cheerful polite lazy rich shy",
    actions="""
        write/wrote/written letter report story poem
        paint wall door chair house boat
        open box door letter window bottle
        buy/bought/bought hat house lamp car toy
        sell/sold/sold house car boat horse farm
        eat/ate/eaten apple cake egg banana
        break/broke/broken window plate cup toy
        steal/stole/stolen wallet ring car horse
        draw/drew/drawn map picture flower horse
        clean table room floor kitchen car
        throw/threw/thrown ball stone bottle stick
        lift box table stone chair
        close window door box gate
        lose/lost/lost key wallet bag coin
        cook meal potato/potatoes egg chicken
        repair car radio roof boat bridge
        find/found/found key coin ring wallet bag
        destroy wall house machine bridge
        make/made/made chair toy cake table hat
        fix clock door lamp radio machine
        discover cave island treasure mistake
        lock door gate box room""",
    addresses="thank help visit invite follow call meet/met/met kiss chase push",
    no_object="arrive disappear sleep/slept/slept smile cough fall/fell/fallen laugh die",
    with_preposition="""
        listen to radio story lesson
        look at picture map house flower window
        talk about house story lesson mistake
        sit/sat/sat on chair table floor stone box
        go/went/gone to station hotel office farm""",
    with_infinitive="decide want hope try plan/planned/planned",
    places="in the kitchen|in the garden|near the station|at the hotel|in the office|behind the church|in the park",
    times="last week|on Monday|this morning|on Tuesday|yesterday morning",
)

VALIDATION = AcceptabilityLexicon(
    people="prisoner judge thief/thieves sailor barber customer musician clerk wife/wives maid duchess husband lord",
    names="Alice Helen Nancy George Henry Frank",
    adjectives="brave proud hungry careful strange honest",
    actions="""
        rent truck taxi tractor scooter
        wear/wore/worn sweater scarf/scarves shirt mask
        slice pie sandwich pizza biscuit
        collect ticket shell card stamp
        hide/hid/hidden ticket shell passport card
        burn card magazine shirt sofa
        mend sweater shirt curtain sofa
        devour pie sandwich pizza biscuit
        obtain ticket passport card magazine""",
    addresses="greet warn attack bother",
    no_object="vanish weep/wept/wept kneel/knelt/knelt",
    with_preposition="""
        gaze at truck shell mask sofa
        rely on passport truck magazine
        joke about pizza sofa magazine""",
    with_infinitive="agree intend offer",
    places="at the beach|in the library|near the lake|behind the bank",
    times="last month|on Sunday|on Saturday",
)

TEST = AcceptabilityLexicon(
    people="scientist nurse dentist journalist professor secretary detective butler hunter plumber politician athlete "
    "queen daughter princess niece bride nun king son prince nephew groom monk",
    names="Sarah Rachel Barbara Jessica Diana Michael William Steven Brian James",
    adjectives="old smart happy kind sad strong wealthy lonely gentle busy",
    actions="""
        take/took/taken photograph pill camera pencil
        ride/rode/ridden bicycle camel pony motorcycle
        choose/chose/chosen gift costume necklace jacket
        grow/grew/grown rose carrot tree onion
        shake/shook/shaken carpet tree blanket basket
        order book jacket camera salad
        deliver book basket gift newspaper
        create poster statue costume game
        purchase jacket camera necklace piano
        bring/brought/brought gift basket salad book
        damage bicycle fence piano camera
        examine diamond document statue pill
        remove carpet mirror shelf/shelves poster
        fetch suitcase ladder basket piano
        receive gift newspaper diamond book""",
    addresses="praise trust ignore interview rescue hug/hugged/hugged arrest",
    no_object="yawn blush giggle faint shiver snore",
    with_preposition="""
        stare at statue mirror diamond poster
        complain about fence newspaper salad carpet
        glance at camera newspaper statue
        apologize for costume carpet salad
        travel to airport village hospital museum""",
    with_infinitive="refuse promise need attempt learn",
    places="in the museum|at the airport|near the river|in the village|in the hospital|behind the theater",
    times="last night|on Friday|last year|on Thursday",
)

SPLITS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}

# ---------------------------------------------------------------------------------------------------------------
# Words and phrases
# ---------------------------------------------------------------------------------------------------------------


def sentence(*parts: str) -> str:
    text = " ".join(parts)
    return text[0].upper() + text[1:] + "."


def with_s(word: str) -> str:
    """Plural of a noun, third person of a verb."""
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


@dataclass(frozen=True)
class Noun:
    singular: str
    plural: str

    @staticmethod
    def parse(entry: str) -> Noun:
        singular, _, plural = entry.partition("/")
        return Noun(singular, plural or with_s(singular))


@dataclass(frozen=True)
class Verb:
    base: str
    past: str
    participle: str

    @staticmethod
    def parse(entry: str) -> Verb:
        base, *irregular = entry.split("/")
        if irregular:
            return Verb(base, *irregular)
        past = base + "d" if base.endswith("e") else base[:-1] + "ied" if with_s(base).endswith("ies") else base + "ed"
        return Verb(base, past, past)

    @property
    def ing(self) -> str:
        return self.base.removesuffix("e") + "ing"


def noun(rng: Random, entries: str) -> Noun:
    return Noun.parse(rng.choice(entries.split()))


def verb(rng: Random, entries: str) -> Verb:
    return Verb.parse(rng.choice(entries.split()))


def action(rng: Random, table: str) -> tuple[Verb, Noun]:
    """A verb and an object that suits it."""
    entry, *objects = rng.choice(table.strip().splitlines()).split()
    return Verb.parse(entry), Noun.parse(rng.choice(objects))


def phrase(rng: Random, phrases: str) -> str:
    return rng.choice(phrases.split("|"))


def some(rng: Random, word: str) -> str:
    """The noun with "the" or "a"."""
    return rng.choice(("the", "an" if word[0] in "aeiou" else "a")) + " " + word


def person(rng: Random, lexicon: AcceptabilityLexicon) -> str:
    """A noun phrase in the singular: "the tall farmer", "the farmer", "Mary"."""
    kind = rng.choice(("name", "noun", "adjective"))
    if kind == "name":
        return rng.choice(lexicon.names.split())
    how = rng.choice(lexicon.adjectives.split()) + " " if kind == "adjective" else ""
    return f"the {how}{noun(rng, lexicon.people).singular}"


# ---------------------------------------------------------------------------------------------------------------
# Phenomena: each returns (acceptable, unacceptable)
# ---------------------------------------------------------------------------------------------------------------


def agreement(rng: Random, lexicon: AcceptabilityLexicon) -> Pair:
    """The farmers are / *is painting the wall now."""
    who, (does, what) = noun(rng, lexicon.people), action(rng, lexicon.actions)
    thing, how = some(rng, what.singular), rng.choice(lexicon.adjectives.split())
    singular, plural, rest = rng.choice(
        (
            ("is", "are", f"{does.ing} {thing} {phrase(rng, lexicon.places)}"),
            ("was", "were", f"very {how} {phrase(rng, lexicon.times)}"),
            ("has", "have", f"already {does.participle} {thing}"),
            ("does", "do", f"not {does.base} {thing} very often"),
        )
    )
    form, right, wrong = rng.choice(((who.singular, singular, plural), (who.plural, plural, singular)))
    return sentence("the", form, right, rest), sentence("the", form, wrong, rest)


def determiner(rng: Random, lexicon: AcceptabilityLexicon) -> Pair:
    """Mary painted these walls / *wall last week."""
    does, what = action(rng, lexicon.actions)
    which, right, wrong = rng.choice(
        (
            (rng.choice(("this", "every", "each", "one")), what.singular, what.plural),
            (rng.choice(("these", "those", "many", "several", "two")), what.plural, what.singular),
        )
    )
    before, when = (person(rng, lexicon), does.past, which), phrase(rng, lexicon.times)
    return sentence(*before, right, when), sentence(*before, wrong, when)


def verb_form(rng: Random, lexicon: AcceptabilityLexicon) -> Pair:
    """John has already painted / *paint the wall."""
    does, what = action(rng, lexicon.actions)
    third = with_s(does.base)
    auxiliary, right, wrongs = rng.choice(
        (
            ("has already", does.participle, (does.base, third, does.ing)),
            ("is", does.ing, (does.base, third)),
            (rng.choice(("can", "will", "must", "should")), does.base, (third, does.past, does.ing)),
            ("did not", does.base, (third, does.past, does.ing)),
        )
    )
    before, after = (person(rng, lexicon), auxiliary), some(rng, what.singular)
    return sentence(*before, right, after), sentence(*before, rng.choice(wrongs), after)


def argument(rng: Random, lexicon: AcceptabilityLexicon) -> Pair:
    """Mary slept (*the letter) in the park last week. Mary wrote / *slept the letter in the park last week."""
    who, after = person(rng, lexicon), f"{phrase(rng, lexicon.places)} {phrase(rng, lexicon.times)}"
    sleeps, (does, what) = verb(rng, lexicon.no_object), action(rng, lexicon.actions)
    thing = some(rng, what.singular)
    good = rng.choice((sentence(who, sleeps.past, after), sentence(who, does.past, thing, after)))
    return good, sentence(who, sleeps.past, thing, after)


def pronoun_case(rng: Random, lexicon: AcceptabilityLexicon) -> Pair:
    """He / *him did not paint the wall last week. Mary thanked him / *he last week."""
    subject, object_ = rng.choice((("I", "me"), ("he", "him"), ("she", "her"), ("we", "us"), ("they", "them")))
    when = phrase(rng, lexicon.times)
    if rng.random() < 0.5:
        does, what = action(rng, lexicon.actions)
        after = ("did not", does.base, some(rng, what.singular), when)
        return sentence(subject, *after), sentence(object_, *after)
    before = (person(rng, lexicon), verb(rng, lexicon.addresses).past)
    return sentence(*before, object_, when), sentence(*before, subject, when)


def word_order(rng: Random, lexicon: AcceptabilityLexicon) -> Pair:
    """Mary painted the wall / *the wall painted / *painted wall the last week."""
    who, (does, what) = person(rng, lexicon), action(rng, lexicon.actions)
    thing, when = some(rng, what.singular), phrase(rng, lexicon.times)
    modal, place = rng.choice(("can", "will", "must", "should")), phrase(rng, lexicon.places)
    good, bad = rng.choice(
        (
            ((does.past, thing, when), (thing, does.past, when)),
            ((does.past, thing, when), (does.past, *reversed(thing.split()), when)),
            ((modal, does.base, thing, place), (does.base, modal, thing, place)),
            ((does.past, thing, place), (does.past, thing, *reversed(place.split()))),
        )
    )
    return sentence(who, *good), sentence(who, *bad)


def function_word(rng: Random, lexicon: AcceptabilityLexicon) -> Pair:
    """Mary looked (at) the map; wanted (to) paint the wall; must (*to) paint the wall; painted the (*the) wall."""
    who, when = person(rng, lexicon), phrase(rng, lexicon.times)
    looked, at, *objects = rng.choice(lexicon.with_preposition.strip().splitlines()).split()
    wants, (does, what) = verb(rng, lexicon.with_infinitive), action(rng, lexicon.actions)
    thing, target = some(rng, what.singular), f"the {Noun.parse(rng.choice(objects)).singular} {when}"
    modal = rng.choice(("can", "will", "must", "should"))
    good, bad = rng.choice(
        (
            ((Verb.parse(looked).past, at, target), (Verb.parse(looked).past, target)),
            ((wants.past, "to", does.base, thing), (wants.past, does.base, thing)),
            ((modal, does.base, thing), (modal, "to", does.base, thing)),
            ((does.past, "the", what.singular, when), (does.past, "the the", what.singular, when)),
        )
    )
    return sentence(who, *good), sentence(who, *bad)


RULES: dict[str, Callable[[Random, AcceptabilityLexicon], Pair]] = {
    rule.__name__: rule
    for rule in (agreement, determiner, verb_form, argument, pronoun_case, word_order, function_word)
}


def generate(split: str, seed: int = 0) -> list[Row]:
    """The rows of a split (`extensions.data.generated.pairs.generate`)."""
    return pairs.generate(RULES, SPLITS, split, seed)
