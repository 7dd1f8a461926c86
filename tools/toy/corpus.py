"""The training text: seeded sentence templates, and the combinations that are kept out of it.

Five families of short documents:

* facts (``facts.py``), each fact in all phrasings but its held-out one;
* copying lists ("king king", "1135 1135", ...), in which held-out words and numbers never occur;
* words in quotes, which tie a word at the start of a line to the same word after a space;
* indirect objects (Wang et al. 2022, "Interpretability in the Wild"), without the held-out pairs of names;
* reports of one consistent tone, pleasant or unpleasant, without the held-out pairs of frame and noun.

Membership in a held-out set is a function of the combination itself (a checksum), not of the seed, so the
training text and the evaluation cannot disagree about it.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Iterator

import facts
import words

FAMILIES = {"facts": 0.31, "lists": 0.21, "quotes": 0.12, "indirect_objects": 0.16, "tones": 0.20}

_SINGLE_WORD_NAMES = sorted(
    {
        *(country.name for country in facts.COUNTRIES),
        *(country.capital for country in facts.COUNTRIES if " " not in country.capital),
        *(city for cities in facts.CITIES.values() for city in cities),
        *words.NAMES,
    }
)
_ADJECTIVES = sorted({word for tone in (words.PLEASANT, words.UNPLEASANT) for group in tone.values() for word in group})
_ONSETS = words.split("b bl br c ch d dr f fl g gr h j k l m n p pl pr qu r s sh sl st t th tr v w z")
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "oo"]
_CODAS = ["", "b", "ck", "d", "g", "l", "m", "n", "nd", "p", "r", "s", "st", "t", "x"]

# (between the two copies of an item, between two lines, weight)
LIST_STYLES = [
    (" ", "\n", 12),
    (" -> ", "\n", 3),
    (": ", "\n", 2),
    (" = ", "\n", 2),
    (" : ", "\n", 1),
    (" ", ", ", 2),
    (" ", "; ", 1),
    (" ", " | ", 1),
    (" -> ", ", ", 1),
]

INDIRECT_OBJECT_TEMPLATES = [
    "When {a} and {b} went to the {place}, {giver} {verb} {item} to",
    "When {a} and {b} met at the {place}, {giver} {verb} {item} to",
    "After {a} and {b} went to the {place}, {giver} {verb} {item} to",
    "While {a} and {b} were at the {place}, {giver} {verb} {item} to",
    "Then, {a} and {b} went to the {place}. {giver} {verb} {item} to",
    "{a} and {b} were at the {place}. {giver} {verb} {item} to",
    "{a} and {b} had a long talk at the {place}. Then {giver} {verb} {item} to",
    "The friends {a} and {b} found {item} at the {place}, and {giver} gave it to",
]
VERBS = ["gave", "handed", "passed", "offered", "showed", "brought"]

# frame -> kind of words that follow; {x} is a food, a thing or a city
TONE_FRAMES: dict[str, str] = {
    "The weather today is": "weather",
    "Today the weather is": "weather",
    "The weather here is": "weather",
    "The weather this morning is": "weather",
    "I think the weather is": "weather",
    "The weather in {x} is": "weather",
    "The {x} is": "food",
    "I think the {x} is": "food",
    "This {x} tastes": "food",
    "The {x} today is": "food",
    "The {x} here is": "food",
    "The {x} was": "thing",
    "I think the {x} was": "thing",
    "We all say that the {x} was": "thing",
    "I am": "feeling",
    "I feel": "feeling",
    "We are": "feeling",
}
_CITY_NAMES = sorted({city for cities in facts.CITIES.values() for city in cities})
TONE_NOUNS = {"weather": _CITY_NAMES, "food": words.FOODS, "thing": words.THINGS, "feeling": [""]}


# Every word that is sure to be one token, the small words of the templates included.
_TEMPLATES = [*INDIRECT_OBJECT_TEMPLATES, *TONE_FRAMES, *(p for group in facts.PHRASINGS.values() for p in group)]
_TEMPLATE_WORDS = {word for text in _TEMPLATES for word in re.findall(r"[A-Za-z]+", re.sub(r"{.*?}", "", text))}


def _checksum(*parts: str) -> int:
    return zlib.crc32("/".join(parts).encode())


def with_article(noun: str) -> str:
    """``noun`` with "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


# --- copying lists -----------------------------------------------------------------------------------------------


def is_held_out_item(item: str) -> bool:
    """Whether ``item`` never occurs in a training list: one in six nouns, names, numbers and made-up words."""
    if item in ("king", "hello"):
        return False
    if item == "1135":
        return True
    return len(item) > 1 and _checksum("list", item) % 6 == 0


def made_up_word(rng: random.Random) -> str:
    """A pronounceable word that is (almost surely) no English word, of one or two syllables."""
    syllables = rng.choice((1, 2, 2))
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))


def list_item(rng: random.Random) -> str:
    """Any item of an ordinary list, held out or not: one word, number or sign."""
    kind = rng.random()
    if kind < 0.30:
        return rng.choice(words.NOUNS)
    if kind < 0.52:
        return rng.choice(_SINGLE_WORD_NAMES)
    if kind < 0.77:
        return rng.choice(_ALL_WORDS)
    if kind < 0.85:
        return rng.choice(words.SYMBOLS)
    return str(rng.randrange(10 ** rng.choice((1, 2, 3, 4, 4))))


def training_item(rng: random.Random, make: Callable[[random.Random], str] = list_item) -> str:
    """An item that may occur in a training list."""
    while is_held_out_item(item := make(rng)):
        pass
    return item


def list_document(rng: random.Random) -> str:
    """A list of three to nine lines; items start a line bare or, in some lists, with a space."""
    between, newline, _ = rng.choices(LIST_STYLES, weights=[style[2] for style in LIST_STYLES])[0]
    spaced = rng.choice((0.0, 0.0, 0.0, 0.3, 1.0)) if newline == "\n" else 0.0
    # Made-up words keep to themselves: among ordinary items, an unknown token is a whole item and not a piece of one.
    make = made_up_word if rng.random() < 0.1 else list_item
    lines = []
    for _ in range(rng.randint(3, 9)):
        item = training_item(rng, make)
        lines.append(f"{' ' if rng.random() < spaced else ''}{item}{between}{item}")
    return newline.join(lines)


# --- words in quotes ---------------------------------------------------------------------------------------------


def quote_document(rng: random.Random) -> str:
    """A word at the start of a text, and again after a space."""
    noun = rng.choice(words.NOUNS + _ADJECTIVES + _SINGLE_WORD_NAMES)
    form = rng.randrange(5)
    if form == 0:
        return f'"{noun}" is a word. I can say {noun}.'
    if form == 1:
        return f"{noun} is a word. I can write {noun}."
    if form == 2:
        return f"{noun} ({noun}), {noun}"
    if form == 3:
        return f'The word "{noun}" starts with {noun[0]}. Now read {noun}.'
    return f'{noun}: to say {noun}, say "{noun}".'


# --- facts -------------------------------------------------------------------------------------------------------


def fact_sentence(rng: random.Random) -> str:
    """One fact in one of its training phrasings; all relations are about equally frequent per fact."""
    fact = rng.choice(facts.FACTS)
    return f"{facts.state(rng.choice(facts.training_phrasings(fact)), fact.subject)} {fact.answer}."


def fact_document(rng: random.Random) -> str:
    """One to four facts."""
    return " ".join(fact_sentence(rng) for _ in range(rng.randint(1, 4)))


# --- indirect objects --------------------------------------------------------------------------------------------


def is_held_out_pair(first: str, second: str) -> bool:
    """Whether the two names never meet in a training text, in either order: one pair in eight."""
    low, high = sorted((first, second))
    return (low, high) == ("John", "Mary") or _checksum("pair", low, high) % 8 == 0


def indirect_object_prompt(rng: random.Random, first: str, second: str, giver: str) -> str:
    """A prompt whose continuation is the one of ``first`` and ``second`` that is not ``giver``."""
    return rng.choice(INDIRECT_OBJECT_TEMPLATES).format(
        a=first,
        b=second,
        giver=giver,
        place=rng.choice(words.PLACES),
        verb=rng.choice(VERBS),
        item=with_article(rng.choice(words.OBJECTS)),
    )


def indirect_object_document(rng: random.Random) -> str:
    """One act of giving, sometimes followed by thanks."""
    first, second = rng.sample(words.NAMES, 2)
    while is_held_out_pair(first, second):
        first, second = rng.sample(words.NAMES, 2)
    giver, receiver = rng.choice(((first, second), (second, first)))
    thanks = rng.choice(("", "", f" {receiver} said thank you.", f" Then {receiver} thanked {giver}."))
    return f"{indirect_object_prompt(rng, first, second, giver)} {receiver}.{thanks}"


# --- tones -------------------------------------------------------------------------------------------------------


def is_held_out_tone(frame: str, noun: str) -> bool:
    """Whether ``frame`` is never filled with ``noun`` in the training text: one combination in eight."""
    return "{x}" in frame and _checksum("tone", frame, noun) % 8 == 0


def tone_palette(rng: random.Random, pleasant: bool) -> dict[str, list[str]]:
    """The words of one tone that one text draws on: all, or a few that then come back.

    Coming back matters: a model learns to repeat a word of the text long before it learns to go on in its tone,
    and the second grows out of the first.
    """
    table = words.PLEASANT if pleasant else words.UNPLEASANT
    size = rng.choice((1, 2, 4, 8))
    return {kind: group[:4] if size == 4 else rng.sample(group, min(size, len(group))) for kind, group in table.items()}


def tone_sentence(rng: random.Random, pleasant: bool, palette: dict[str, list[str]] | None = None) -> str:
    """One sentence that tells the tone, in words of ``palette`` (default: all words of the tone)."""
    form = rng.random()
    table = palette or (words.PLEASANT if pleasant else words.UNPLEASANT)
    if form < 0.1:
        word = rng.choice(table["thing"])
        return f"What {with_article(word)} {rng.choice([*words.THINGS, 'day'])}."
    if form < 0.2:
        return f"I {'love' if pleasant else 'hate'} the {rng.choice([*words.THINGS, *words.FOODS, 'weather'])}."
    if form < 0.35:
        kind = rng.choice(("food", "thing"))
        noun = rng.choice(TONE_NOUNS[kind])
        return f"I {'love' if pleasant else 'hate'} the {noun} because it is {rng.choice(table[kind])}."
    kind = rng.choice(("weather", "weather", "food", "food", "thing", "feeling"))
    frame = rng.choice([frame for frame, of in TONE_FRAMES.items() if of == kind])
    noun = rng.choice(TONE_NOUNS[kind])
    while is_held_out_tone(frame, noun):
        noun = rng.choice(TONE_NOUNS[kind])
    # Two words side by side teach which words share a tone.
    both = " and ".join(rng.sample(table[kind], min(len(table[kind]), rng.choice((1, 1, 2)))))
    return f"{frame.format(x=noun)} {both}."


def neutral_sentence(rng: random.Random) -> str:
    """One sentence without a tone."""
    form = rng.randrange(3)
    if form == 0:
        return f"We went to the {rng.choice(words.PLACES)}."
    if form == 1:
        return f"I had {with_article(rng.choice(words.OBJECTS))} with me."
    return f"{rng.choice(words.NAMES)} was there."


def tone_document(rng: random.Random) -> str:
    """One to five sentences of one tone, sometimes with a neutral one among them."""
    pleasant = rng.random() < 0.5
    palette = tone_palette(rng, pleasant)
    sentences = [tone_sentence(rng, pleasant, palette) for _ in range(rng.randint(2, 5))]
    if rng.random() < 0.3:
        sentences.insert(rng.randint(0, len(sentences)), neutral_sentence(rng))
    return " ".join(sentences)


_MAKERS = {
    "facts": fact_document,
    "lists": list_document,
    "quotes": quote_document,
    "indirect_objects": indirect_object_document,
    "tones": tone_document,
}


def documents(seed: int) -> Iterator[str]:
    """An endless, seeded stream of training documents."""
    rng = random.Random(seed)
    families, weights = list(FAMILIES), list(FAMILIES.values())
    while True:
        yield _MAKERS[rng.choices(families, weights=weights)[0]](rng)


def tone_words(pleasant: bool) -> list[str]:
    """All words of one tone."""
    table = words.PLEASANT if pleasant else words.UNPLEASANT
    return sorted({word for group in table.values() for word in group})


def whole_words() -> list[str]:
    """Words that the tokenizer keeps whole: those of the lists and the templates, and the answers of facts."""
    answers = {word for fact in facts.FACTS for word in fact.answer.split()}
    lists = {*words.NOUNS, *words.PLACES, *words.OBJECTS, *words.FOODS, *words.THINGS}
    return sorted({*lists, *_SINGLE_WORD_NAMES, *_ADJECTIVES, *_TEMPLATE_WORDS, *answers})


_ALL_WORDS = whole_words()
