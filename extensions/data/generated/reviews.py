"""Sentiment of short reviews (a task like SST-2) from templates: nothing to download.

Every pair is a positive review and a negative one that differ in the words of sentiment or in the negation alone. The
splits share function words and intensifiers only: topics, their aspects, and the adjectives, verbs, adverbs and nouns
of sentiment of one never occur in another, so accuracy means generalisation.

    python -c "from extensions.data.generated.reviews import generate; print(generate('test')[0])"
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from extensions.data.generated import pairs
from extensions.data.generated.pairs import Pair, Row

INTENSIFIERS = "really truly absolutely simply"  # shared by the splits; they suit every adjective of a thing

# ---------------------------------------------------------------------------------------------------------------
# Lexicon. A slash stands between what is positive and what is negative.
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReviewLexicon:
    topics: str  # a line each: thing | preposition | what one does with it | aspect: adjectives / adjectives | ...
    adjectives: str  # that fit any thing and are strong, so that "absolutely" suits them
    verbs: str  # of feeling, in the plural: "we ... the food"
    likings: str  # such that "none of us ..." is clearly negative
    nouns: str  # countable; "this film was a ..."
    people: str  # "my ... and I"
    openers: str
    advice: str  # with {who}, {thing}, {does}, {opener} and, in brackets, what makes it positive / negative


TRAIN = ReviewLexicon(
    topics="""
        restaurant | in | eat in | food: tasty delicious / bland tasteless | waiter: polite attentive / rude lazy
            | dessert: tasty delicious / bland tasteless
        hotel | in | stay in | room: clean spacious / dirty cramped | bed: comfortable clean / uncomfortable dirty
            | receptionist: polite attentive / rude lazy | breakfast: tasty delicious / bland tasteless
        film | in | watch | plot: clever exciting / stupid boring | acting: convincing natural / unconvincing clumsy
            | dialogue: clever convincing / stupid clumsy
        novel | of | read | story: clever exciting / stupid boring | style: elegant vivid / clumsy tedious
            | ending: exciting convincing / boring unconvincing
        laptop | of | buy | screen: sharp bright / blurry dim | battery: reliable efficient / unreliable weak
            | keyboard: sturdy comfortable / flimsy uncomfortable
        tour | on | take | driver: polite careful / rude reckless | bus: clean comfortable / dirty uncomfortable
            | route: exciting pretty / boring ugly""",
    adjectives="great wonderful excellent lovely amazing brilliant superb enjoyable / "
    "terrible awful horrible dreadful lousy miserable disappointing rotten",
    verbs="loved|enjoyed|liked|were happy with / hated|disliked|despised|were unhappy with",
    likings="liked|enjoyed|were happy with",
    nouns="triumph success joy treat / failure disaster nightmare disappointment",
    people="wife husband parents kids mother father aunt uncle",
    openers="in my opinion,|I think that|if you ask me,|we all thought that",
    advice="""
        {who} would [gladly/never] {does} this {thing} again
        {who} would [happily/never] {does} this {thing} again
        {who} would [definitely/never] {does} this {thing} a second time
        {opener} you should [definitely/never] {does} this {thing}
        {opener} this {thing} was [really/not] worth the price
        {opener} this {thing} was [worth every cent/a waste of time]
        {opener} everyone should [choose/avoid] this {thing}
        {who} will tell everyone to [choose/avoid] this {thing}""",
)

VALIDATION = ReviewLexicon(
    topics="""
        bakery | in | shop at | bread: crusty crunchy / soggy moldy | cashier: courteous gracious / hostile snobbish
        podcast | of | listen to | host: witty humorous / conceited smug
            | interview: insightful informative / shallow pointless
        scooter | of | ride | brake: dependable responsive / faulty squeaky | saddle: ergonomic stable / wobbly faulty
        campsite | at | camp at | shower: hygienic tidy / grimy moldy
            | owner: courteous gracious / hostile snobbish""",
    adjectives="terrific magnificent exceptional phenomenal / abysmal ghastly nasty deplorable",
    verbs="praised|were satisfied with|treasured / cursed|were dissatisfied with|resented",
    likings="praised|were satisfied with",
    nouns="hit bargain treasure / flop scam fiasco",
    people="cousin niece nephew",
    openers="frankly,|I believe that|it seems to me that",
    advice="""
        {who} would [willingly/never] {does} this {thing} again
        {who} would [keenly/never] {does} this {thing} again
        {opener} this {thing} [really deserves/does not deserve] five stars""",
)

TEST = ReviewLexicon(
    topics="""
        cafe | in | have coffee in | coffee: fresh aromatic / stale watery | cake: fresh moist / stale dry
            | barista: friendly cheerful / unfriendly grumpy
        concert | at | attend | singer: talented energetic / untalented listless | sound: crisp clear / muffled tinny
            | band: talented lively / untalented lifeless
        museum | in | visit | guide: helpful knowledgeable / unhelpful arrogant
            | guard: friendly helpful / unfriendly arrogant | exhibition: fascinating lively / dreary lifeless
        jacket | of | wear | fabric: durable cozy / scratchy shabby | zipper: durable robust / defective stiff
            | color: attractive stylish / unattractive garish
        phone | of | use | camera: powerful robust / useless defective | speaker: crisp clear / muffled tinny
            | software: fast intuitive / slow buggy
        flight | on | book | crew: friendly helpful / unfriendly unhelpful | seat: cozy soft / narrow stiff
            | meal: fresh appetizing / stale disgusting""",
    adjectives="fantastic delightful perfect marvelous outstanding fabulous splendid / "
    "pathetic appalling dismal atrocious unbearable frustrating annoying",
    verbs="adored|admired|were pleased with|were thrilled with / loathed|detested|were annoyed by|were disgusted by",
    likings="were pleased with|were impressed by|were delighted with",
    nouns="pleasure gem masterpiece delight / catastrophe mess fraud debacle",
    people="brother sister colleagues son daughter neighbors",
    openers="to be honest,|I must say that|without a doubt,",
    advice="""
        {who} would [eagerly/never] {does} this {thing} again
        {who} would [certainly/never] {does} this {thing} again
        {who} [can/cannot] recommend this {thing} to anyone
        {opener} our money for this {thing} was [well/poorly] spent""",
)

SPLITS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}

# ---------------------------------------------------------------------------------------------------------------
# Words and phrases
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Topic:
    thing: str
    preposition: str
    does: str
    aspects: dict[str, str]  # aspect -> adjectives / adjectives

    @staticmethod
    def parse(line: str) -> Topic:
        thing, preposition, does, *aspects = (part.strip() for part in line.split("|"))
        return Topic(thing, preposition, does, dict(aspect.split(": ") for aspect in aspects))

    def of(self, aspect: str) -> str:
        return f"the {aspect} {self.preposition} this {self.thing}"


def topic(rng: Random, lexicon: ReviewLexicon) -> Topic:
    return Topic.parse(rng.choice(re.sub(r"\n\s*\|", " |", lexicon.topics.strip()).splitlines()))


def either(rng: Random, entries: str) -> Pair:
    """One of what is before the slash, one of what is after it; separated by bars or by spaces."""
    good, bad = (side.strip().split("|" if "|" in entries else None) for side in entries.split("/"))
    return rng.choice(good), rng.choice(bad)


def phrase(rng: Random, phrases: str) -> str:
    return rng.choice(phrases.split("|"))


def intensifier(rng: Random) -> str:
    return rng.choice(INTENSIFIERS.split())


def who(rng: Random, lexicon: ReviewLexicon) -> str:
    """Always a plural."""
    return f"my {rng.choice(lexicon.people.split())} and I" if rng.random() < 0.8 else "we"


def some(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def fill(template: str, *choices: Pair) -> Pair:
    """Puts the positive words into the places {0}, {1} ... of one sentence, the negative words into the other."""
    good, bad = (template.format(*words) for words in zip(*choices, strict=True))
    return good[0].upper() + good[1:] + ".", bad[0].upper() + bad[1:] + "."


# ---------------------------------------------------------------------------------------------------------------
# Kinds of review: each returns (positive, negative)
# ---------------------------------------------------------------------------------------------------------------


def plain(rng: Random, lexicon: ReviewLexicon) -> Pair:
    """In my opinion, this was a lovely / terrible hotel. I think that the food in this restaurant was tasty / bland."""
    about, opener = topic(rng, lexicon), phrase(rng, lexicon.openers)
    if rng.random() < 0.5:
        good, bad = either(rng, lexicon.adjectives)
        return fill(f"{opener} this was {{0}} {about.thing}", (some(good), some(bad)))
    aspect, adjectives = rng.choice(list(about.aspects.items()))
    return fill(f"{opener} {about.of(aspect)} was {{0}}", either(rng, adjectives))


def intensified(rng: Random, lexicon: ReviewLexicon) -> Pair:
    """Everything about this film was really brilliant / awful. The room in this hotel was absolutely lovely / awful."""
    about, very, adjectives = topic(rng, lexicon), intensifier(rng), either(rng, lexicon.adjectives)
    template = rng.choice(
        (
            f"everything about this {about.thing} was {very} {{0}}",
            f"what {some(very)} {{0}} {about.thing} this was",
            f"{about.of(rng.choice(list(about.aspects)))} was {very} {{0}}",
        )
    )
    return fill(template, adjectives)


def negated(rng: Random, lexicon: ReviewLexicon) -> Pair:
    """The waiter was not rude / polite at all. The room was very / not at all clean. All / none of us liked it."""
    about = topic(rng, lexicon)
    aspect, adjectives = rng.choice(list(about.aspects.items()))
    good, bad = either(rng, adjectives)
    opener = rng.choice(("", phrase(rng, lexicon.openers) + " "))
    template, *choice = rng.choice(
        (
            (f"{opener}{about.of(aspect)} was not {{0}} at all", bad, good),
            (f"{opener}{about.of(aspect)} was {{0}} {good}", "very", "not at all"),
            (f"{opener}{about.of(aspect)} was {{0}} {bad}", "not at all", "very"),
            (f"{{0}} of us {phrase(rng, lexicon.likings)} {about.of(aspect)}", "all", "none"),
        )
    )
    return fill(template, (choice[0], choice[1]))


def contrast(rng: Random, lexicon: ReviewLexicon) -> Pair:
    """The food was bland / tasty, but all in all this was a lovely / terrible restaurant: the last clause decides."""
    about, (good, bad) = topic(rng, lexicon), either(rng, lexicon.adjectives)
    aspect, adjectives = rng.choice(list(about.aspects.items()))
    template, *choice = rng.choice(
        (
            (f"the {aspect} was {{0}}, but all in all this was {{1}} {about.thing}", some(good), some(bad)),
            (f"the {aspect} was {{0}}, but this {about.thing} as a whole was {intensifier(rng)} {{1}}", good, bad),
            (f"the {aspect} was {{0}}, but we still {{1}} this {about.thing}", *either(rng, lexicon.verbs)),
        )
    )
    first = either(rng, adjectives)
    return fill(template, (first[1], first[0]), (choice[0], choice[1]))


def advice(rng: Random, lexicon: ReviewLexicon) -> Pair:
    """My wife and I would gladly / never stay in this hotel again. I can / cannot recommend it to anyone."""
    about, template = topic(rng, lexicon), rng.choice(lexicon.advice.strip().splitlines()).strip()
    fields = {"{thing}": about.thing, "{does}": about.does}
    fields |= {"{who}": who(rng, lexicon), "{opener}": phrase(rng, lexicon.openers)}
    before, good, bad, after = re.split(r"\[(.*)/(.*)\]", re.sub(r"{.*?}", lambda match: fields[match[0]], template))
    return fill(f"{before}{{0}}{after}", (good, bad))


def two_aspects(rng: Random, lexicon: ReviewLexicon) -> Pair:
    """The food in this restaurant was tasty / bland and the waiter was polite / rude."""
    about = topic(rng, lexicon)
    (first, its), (second, others) = rng.sample(list(about.aspects.items()), 2)
    template = rng.choice(
        (
            f"{about.of(first)} was {{0}} and the {second} was {{1}}",
            f"the {first} was {{0}} and {about.of(second)} was also {{1}}",
            f"not only was {about.of(first)} {{0}}, the {second} was also {{1}}",
        )
    )
    return fill(template, either(rng, its), either(rng, others))


def feeling(rng: Random, lexicon: ReviewLexicon) -> Pair:
    """My parents and I loved / hated the plot of this film."""
    about, really = topic(rng, lexicon), rng.choice(("", "really ", "truly "))
    what = rng.choice([about.of(aspect) for aspect in about.aspects] + [f"everything about this {about.thing}"])
    return fill(f"{who(rng, lexicon)} {really}{{0}} {what}", either(rng, lexicon.verbs))


def verdict(rng: Random, lexicon: ReviewLexicon) -> Pair:
    """For my wife and me, this film was nothing but a joy / nightmare."""
    about, (good, bad) = topic(rng, lexicon), either(rng, lexicon.nouns)
    real = rng.choice(("", "real ", "true "))
    whom = re.sub("I$", "me", who(rng, lexicon)).replace("we", "us")
    template = rng.choice(
        (
            f"for {whom}, this {about.thing} was nothing but {{0}}",
            f"{phrase(rng, lexicon.openers)} this {about.thing} was {{0}}",
            f"this {about.thing} was {{0}} for {whom}",
        )
    )
    return fill(template, (some(real + good), some(real + bad)))


KINDS: dict[str, Callable[[Random, ReviewLexicon], Pair]] = {
    kind.__name__: kind for kind in (plain, intensified, negated, contrast, advice, two_aspects, feeling, verdict)
}


def generate(split: str, seed: int = 0) -> list[Row]:
    """The rows of a split (`extensions.data.generated.pairs.generate`)."""
    return pairs.generate(KINDS, SPLITS, split, seed)
