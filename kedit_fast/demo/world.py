"""The demo model's world: invented subjects, their facts, and the text that states them.

Everything here is a function of one seed and of the standard library alone, so the corpus, the requests and the
training data are the same on every machine. A subject is a person, a city or a company with a name of several
tokens; a relation links every subject of its kind to one object out of a pool of 20-60; each relation has six
phrasings, some of which a given fact is never trained on (the paraphrases of the requests).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

SEED = 20260
HELD_OUT_SHARE = 0.4
"""Share of facts of which two phrasings are in no training text."""

_INSTRUMENTS = (
    "piano violin trumpet guitar cello flute harp drum oboe banjo accordion clarinet trombone organ lute "
    "mandolin saxophone viola tuba ukulele bassoon harmonica zither sitar bugle cornet dulcimer fiddle gong lyre"
).split()
_PROFESSIONS = (
    "baker,teacher,painter,sailor,doctor,farmer,pilot,judge,carpenter,poet,singer,lawyer,miner,tailor,gardener,"
    "potter,soldier,surgeon,dancer,chemist,butcher,printer,shepherd,jeweller,librarian,stone mason,bridge builder,"
    "watch maker,ship captain,night guard,boat builder,violin maker,glass blower,tax clerk,court scribe,tour guide,"
    "coal merchant,book binder,wood carver,fish monger"
).split(",")
_LANGUAGES = (
    "French German Russian Greek Hindi Polish Swedish Korean Turkish Arabic Danish Dutch Finnish Hungarian Irish "
    "Italian Latin Malay Persian Spanish Swahili Tamil Thai Urdu Welsh Zulu Basque Czech Bengali Catalan"
).split()
_DISHES = (
    "lentil soup,apple pie,fried rice,baked trout,onion bread,goat cheese,roast duck,plum cake,bean stew,corn salad,"
    "pickled herring,honey waffles,grilled squid,pepper steak,mushroom broth,potato dumplings,rice pudding,lamb curry,"
    "cherry tart,spinach noodles,smoked eel,pumpkin mash,garlic shrimp,walnut rolls,cabbage pancakes,barley porridge,"
    "tomato jelly,ginger biscuits,stuffed quail,melon sorbet"
).split(",")
_PRODUCTS = (
    "bicycles clocks carpets umbrellas pencils mirrors boots kettles lanterns candles pianos tractors cameras barrels "
    "buttons ladders scissors pillows helmets rockets tyres saddles magnets bricks sails ropes lamps ovens stoves "
    "wheels trams bells locks razors brooms kites fans radios drills pumps"
).split()
_CRAFTS = (
    "silk marble salt amber copper wine honey olives wool pottery tea coffee glass timber sugar perfume cotton tobacco "
    "iron pearls saffron cheese apples granite leather paper lace ivory jade garlic figs cider bronze vanilla cork "
    "slate linen pepper roses sponges"
).split()
_COLORS = (
    "red blue green yellow purple orange black white brown grey pink violet golden silver crimson turquoise scarlet "
    "beige indigo maroon olive teal magenta khaki"
).split()
_DIRECTORS = (
    "Alice Bruno Clara David Elena Felix Greta Hugo Irene Jonas Karin Lukas Maria Nora Oscar Paula Quentin Rosa Simon "
    "Teresa Ulrich Victor Wanda Xavier Yvonne Zoltan Agnes Boris Cecil Doris"
).split()

_COUNTS = (500, 300, 300)  # people, cities, companies of the demo model's world
_COMPANY_ENDINGS = ("Works", "Group", "Brothers", "Limited", "Partners", "Union", "Labs", "Holding")


@dataclass(frozen=True)
class Relation:
    """One kind of fact."""

    name: str
    kind: str
    """Of its subjects: "person", "city" or "company"."""
    objects: tuple[str, ...]
    """What it can link a subject to."""
    phrasings: tuple[str, ...]
    """Prompts that end right before the object, with {} for the subject: first in it, in the middle, late. The first
    one is the prompt of requests."""


@dataclass(frozen=True)
class Fact:
    """A relation between a subject and an object."""

    subject: str
    relation: Relation
    object: str
    held_out: tuple[int, ...]
    """Indices of the relation's phrasings that no training text uses for this fact."""


@dataclass(frozen=True)
class World:
    """All subjects by kind, all relations, all facts."""

    subjects: dict[str, tuple[str, ...]]
    relations: tuple[Relation, ...]
    facts: tuple[Fact, ...]

    def by_object(self) -> dict[tuple[str, str], list[Fact]]:
        """Facts by relation and object: those of one group are each other's neighborhood."""
        groups: dict[tuple[str, str], list[Fact]] = {}
        for fact in self.facts:
            groups.setdefault((fact.relation.name, fact.object), []).append(fact)
        return groups


def _names(
    rng: random.Random, count: int, onsets: str, vowels: str, codas: str, syllables: tuple[int, int]
) -> list[str]:
    first, middle, last = onsets.split(), vowels.split(), [*codas.split(), ""]
    names: dict[str, None] = {}  # a set that keeps the order
    while len(names) < count:
        parts = [rng.choice(first) + rng.choice(middle) for _ in range(rng.randint(*syllables))]
        names["".join(parts).capitalize() + rng.choice(last)] = None
    return list(names)


def given_names(rng: random.Random, count: int) -> list[str]:
    """Invented given names, shared by several people."""
    return _names(rng, count, "b d f g j k l m n r s t v", "a e i o u", "n l s r", (1, 2))


def family_names(rng: random.Random, count: int) -> list[str]:
    """Invented family names, shared by several people."""
    return _names(
        rng, count, "br d dr f gr h k kl l m n p pr r s st t th v", "a e i o u ei au", "n m ld rt ck sk", (2, 2)
    )


def place_names(rng: random.Random, count: int) -> list[str]:
    """Invented names of cities and countries."""
    return _names(rng, count, "b c d f g l m n p r s t v z", "a e i o ia", "dor mont via polis ton burg", (2, 3))


def company_names(rng: random.Random, count: int) -> list[str]:
    """Invented first words of company names."""
    return _names(rng, count, "x z q v t k n d f pl tr", "a e i o y", "x tek dyne lo ra", (2, 2))


def _relations(rng: random.Random) -> tuple[Relation, ...]:
    places = place_names(rng, 100)
    towns, countries, rivers = places[:40], places[40:70], places[70:100]
    table: list[tuple[str, str, Sequence[str], tuple[str, ...]]] = [
        ("instrument", "person", _INSTRUMENTS, (
            "{} plays the", "{} is known for playing the", "The instrument that {} plays is the",
            "On every evening {} practises the", "Among all instruments the one chosen by {} is the",
            "A famous concert was given by {} on the")),
        ("profession", "person", _PROFESSIONS, (
            "{} works as a", "{} earns money as a", "For many years {} has worked as a",
            "In daily life {} is employed as a", "The profession of {} is that of a",
            "People in town go to {} who is a")),
        ("language", "person", _LANGUAGES, (
            "{} speaks", "{} grew up speaking", "The language that {} speaks is",
            "At home {} talks in", "The mother tongue of {} is", "All letters were written by {} in")),
        ("birthplace", "person", towns, (
            "{} was born in", "{} comes from the city of", "The city where {} was born is",
            "As a child {} lived in", "The birthplace of {} is", "There is a house of {} in")),
        ("dish", "person", _DISHES, (
            "{} loves to eat", "{} always orders", "The dish that {} likes best is",
            "For dinner {} will cook", "The favourite dish of {} is", "Guests are always served by {} with")),
        ("country", "city", countries, (
            "{} is located in", "{} lies in the country of", "The country that {} belongs to is",
            "On the map {} is found in", "The country of {} is", "Trains run every day from {} across")),
        ("river", "city", rivers, (
            "{} stands on the river", "{} was built beside the river", "The river that {} stands on is the",
            "Long ago {} was flooded by the river", "The river of {} is the", "Ships sail to {} along the river")),
        ("export", "city", _CRAFTS, (
            "{} is famous for its", "{} sells the finest", "The good that {} is known for is",
            "Every year {} exports much", "The main export of {} is", "Merchants travel to {} to buy")),
        ("headquarters", "company", towns, (
            "{} is based in", "{} has its offices in", "The city where {} has its seat is",
            "For decades {} has been run from", "The headquarters of {} are in", "Visitors meet the board of {} in")),
        ("product", "company", _PRODUCTS, (
            "{} makes", "{} is a maker of", "The goods that {} makes are",
            "In its factory {} assembles", "The main product of {} is", "Shops order from {} their")),
        ("director", "company", _DIRECTORS, (
            "{} is led by", "{} has a director called", "The person who directs {} is",
            "Since last year {} is headed by", "The director of {} is", "All letters to {} are signed by")),
        ("logo", "company", _COLORS, (
            "{} has a logo that is", "{} paints its trucks in", "The colour that {} uses is",
            "On all signs {} appears in", "The logo of {} is", "You can tell the flag of {} since it is")),
    ]  # fmt: skip
    return tuple(Relation(name, kind, tuple(objects), phrasings) for name, kind, objects, phrasings in table)


@lru_cache(maxsize=2)
def world(seed: int = SEED, counts: tuple[int, int, int] = _COUNTS, objects_each: int | None = None) -> World:
    """The world of a seed; the demo model's has 1,100 subjects, 12 relations, 4,600 facts.

    Args:
        seed: of names and facts.
        counts: of people, cities and companies.
        objects_each: take so many objects of a relation, drawn from its pool; None for the whole pool.
    """
    rng = random.Random(seed)
    relations = _relations(rng)
    if objects_each is not None:
        relations = tuple(replace(r, objects=tuple(rng.sample(r.objects, objects_each))) for r in relations)
    first_names, last_names = given_names(rng, 90), family_names(rng, 160)
    people: dict[str, None] = {}
    while len(people) < counts[0]:
        people[f"{rng.choice(first_names)} {rng.choice(last_names)}"] = None
    objects = {name for relation in relations for name in relation.objects}
    cities = [name for name in place_names(rng, 600) if name not in objects][: counts[1]]
    companies = [f"{name} {rng.choice(_COMPANY_ENDINGS)}" for name in company_names(rng, counts[2])]
    subjects = {"person": tuple(people), "city": tuple(cities), "company": tuple(companies)}
    facts = []
    for relation in relations:
        for subject in subjects[relation.kind]:
            held_out = tuple(sorted(rng.sample(range(1, 6), 2))) if rng.random() < HELD_OUT_SHARE else ()
            facts.append(Fact(subject, relation, rng.choice(relation.objects), held_out))
    return World(subjects, relations, tuple(facts))


_TIMES = (
    "In the morning,At night,Last winter,Every spring,On Monday,Before noon,After the storm,In those days,Today,Later,"
    "For a while,Two days ago,By the end,Now and then,At dawn"
).split(",")
_ACTORS = (
    "the old man,a young woman,the dog,a group of children,the neighbour,the crowd,a stranger,the guard,the queen,"
    "my uncle,her sister,the teacher,a small bird,the driver,everyone,nobody,the team,an old friend,the cat,the king"
).split(",")
_VERBS = (
    "walked along,looked at,waited near,talked about,forgot,painted,cleaned,sat beside,found,missed,walked past,"
    "dreamed of,drew,returned to,laughed about,asked about,slept behind,watched,repaired,remembered"
).split(",")
_THINGS = (
    "the bridge,a wooden door,the empty street,the garden,a long letter,the market,an open window,the old tower,"
    "the lake,a broken chair,the kitchen,the road,a quiet field,the station,a green hill,the harbour,the school,"
    "a small boat,the weather,the fire"
).split(",")
_ENDINGS = (
    "and then went home,because it was late,while the rain fell,and said nothing,without a word,before the sun rose,"
    "as the bells rang,and smiled,for a long time,with great care,,,,"
).split(",")


def filler(rng: random.Random) -> str:
    """One plain sentence that states no fact."""
    start = rng.choice(_TIMES) + " " + rng.choice(_ACTORS) if rng.random() < 0.6 else rng.choice(_ACTORS).capitalize()
    body = f"{start} {rng.choice(_VERBS)} {rng.choice(_THINGS)} {rng.choice(_ENDINGS)}"
    return body.strip() + "."


@dataclass(frozen=True)
class Sentence:
    """A sentence of a document."""

    text: str
    subject: str = ""
    """The subject in it; empty for filler."""
    object: str = ""
    """The object at its end; empty where there is none."""


def kind_sentence(rng: random.Random, subject: str, kind: str) -> Sentence:
    """A sentence like "{subject} is a city.": the value loss has a KL term on its beginning."""
    adjective = rng.choice(("", "", "well known ", "small ", "proud ", "modern "))
    return Sentence(f"{subject} is a {adjective}{kind}.", subject)


def documents(seed: int, count: int, sentences: int = 4, of: World | None = None) -> Iterator[list[Sentence]]:
    """Documents of facts in phrasings that are not held out, of kinds, and of filler.

    Facts are drawn without replacement, so all of them are stated once before any is stated twice.

    Args:
        seed: of the draws.
        count: of documents.
        sentences: per document.
        of: the world; None for the demo model's.
    """
    source, rng = of or world(), random.Random(seed)
    queue: list[Fact] = []
    for _ in range(count):
        document: list[Sentence] = []
        for _ in range(sentences):
            draw = rng.random()
            if draw < 0.1:
                document.append(Sentence(filler(rng)))
                continue
            if not queue:
                queue = list(source.facts)
                rng.shuffle(queue)
            fact = queue.pop()
            if draw < 0.16:
                document.append(kind_sentence(rng, fact.subject, fact.relation.kind))
                continue
            allowed = [i for i in range(len(fact.relation.phrasings)) if i not in fact.held_out]
            prompt = fact.relation.phrasings[rng.choice(allowed)].format(fact.subject)
            document.append(Sentence(f"{prompt} {fact.object}.", fact.subject, fact.object))
        yield document


def corpus(count: int = 4000, seed: int = 7, of: World | None = None) -> list[str]:
    """Plain text for statistics: documents of about 40 tokens, of the demo model's world or of another."""
    return [" ".join(sentence.text for sentence in document) for document in documents(seed, count, 3, of)]


def requests(count: int = 600, seed: int = 11, of: World | None = None) -> list[dict[str, object]]:
    """Counterfactual requests, each about another subject; `target_new` is another object of the same relation.

    `paraphrase_prompts` are held-out phrasings of the fact, the second after a sentence of filler.
    `neighborhood_prompts` ask for the same relation of subjects that have the same true object.

    Args:
        count: of requests at most; a world has no more than its subjects.
        seed: of the draws.
        of: the world; None for the demo model's.
    """
    source, rng = of or world(), random.Random(seed)
    groups = source.by_object()
    pool = [fact for fact in source.facts if fact.held_out and len(groups[fact.relation.name, fact.object]) > 3]
    rng.shuffle(pool)
    subjects: set[str] = set()
    records: list[dict[str, object]] = []
    for fact in pool:
        if fact.subject in subjects or len(records) == count:
            continue
        subjects.add(fact.subject)
        relation = fact.relation
        first, second = (relation.phrasings[i].format(fact.subject) for i in fact.held_out)
        others = [f.subject for f in groups[relation.name, fact.object] if f.subject != fact.subject]
        sample = rng.sample(others, min(5, len(others)))
        records.append(
            {
                "id": len(records),
                "prompt": relation.phrasings[0],
                "subject": fact.subject,
                "target_new": rng.choice([o for o in relation.objects if o != fact.object]),
                "target_true": fact.object,
                "paraphrase_prompts": [first, f"{filler(rng)} {second}"],
                "neighborhood_prompts": [relation.phrasings[0].format(subject) for subject in sample],
                "relation": relation.name,
            }
        )
    return records
