"""
A language whose truth is known: very short stories out of the grammar in fables.txt, the embedded corpus of SunFish.

    python fables.py                     # four stories, and how likely they are

`draw` tells a story and its log-probability, `log_prob` finds the same number in the text alone, and `judge` says what
is wrong with a text. All three read the one grammar, which is written as for Tracery (Compton et al. 2015).
"""
import functools
import math
import os
import random
import re
from pathlib import Path
from typing import NamedTuple

PRONOUNS = {"he": ("she", "he"), "him": ("her", "him"), "his": ("her", "his"), "He": ("She", "He")}
END = re.compile(r'(?<=[.!?]) (?=[A-Z"{])|(?<=[.!?]") (?=[A-Z"{])')             # of a sentence
PIECE = re.compile(r"( ?)\{(?:(a) )?(\w+)(?:\.(\w+))?\}|(.+?)(?= ?\{|$)")       # of an alternative


class Words(NamedTuple):
    text: str
    about: str = ""                  # what they name: thing, place, pronoun ...; "": they are the grammar's own


class Slot(NamedTuple):
    name: str                        # of a rule or a variable
    space: str = ""                  # that stands before it
    form: str = ""                   # of a variable: "a", or a pronoun


def read_grammar(text):
    """({rule: its alternatives}, {variable: its values}, {variable: what kind of thing it is})."""
    rules, values = {}, {}
    kinds = {}
    lines = text.replace("\n  ", " ")                        # a rule goes on in lines that are indented
    for name, variables, sign, right in re.findall(r"(?m)^(\w+)(?: \(([\w, ]+)\))?(:| =) (.+)", lines):
        parts = [part.strip().removeprefix("-") for part in right.split("|")]
        if sign == ":":
            rules[name] = parts
            continue
        parts = [value for part in parts for value in values.get(part.strip("{}"), [part])]
        for variable in (variables or name).split(", "):
            values[variable], kinds[variable] = parts, name
    return rules, values, kinds


def read_template(template, before=""):
    """The Words and Slots of an alternative with `before` before it; none if it is empty."""
    items = []
    for space, article, name, form, words in PIECE.findall(template and before + template):
        if name in PRONOUNS:
            name, form = "hero", name
        items.append(Words(words) if words else Slot(name, space, article or form))
    return tuple(items)


TEMPLATES, VALUES, KINDS = read_grammar(Path(__file__).with_suffix(".txt").read_text(encoding="utf-8"))
RULES = {(name, space): [read_template(template, space) for template in templates]
         for name, templates in TEMPLATES.items() for space in ("", " ")}
SENTENCES = sorted({read_template(sentence) for templates in TEMPLATES.values() for template in templates
                    for sentence in END.split(template) if re.search(r'[.!?]"?$', sentence)})
KIND_OF_WORD = {value.split()[-1]: KINDS[name] for name, values in VALUES.items() for value in values}
KIND_OF_WORD |= {word: "pronoun" for words in PRONOUNS.values() for word in words}
STORY = (Slot("story"),)


def ways(slot, story):
    """The equally likely ways to fill a slot of a story {variable: value}: alternatives of its rule, or values."""
    if slot.name in TEMPLATES:
        return RULES[slot.name, slot.space]
    if slot.name in story:
        return [story[slot.name]]
    return [value for value in VALUES[slot.name] if value not in story.values()]


@functools.cache
def say(slot, value):
    """The Words for a variable with this value."""
    if slot.form in PRONOUNS:
        return Words(slot.space + PRONOUNS[slot.form][value in VALUES["boy"]], "pronoun")
    article = {"": "", "a": "an " if value[0] in "aeiou" else "a "}[slot.form]
    return Words(slot.space + article + value, KINDS[slot.name])


def fill(slot, way):
    """The items that stand in the place of a slot which is filled in this way."""
    return (say(slot, way),) if slot.name in KINDS else way


def draw(rng):
    """(a story, its log-probability in nats); rng is a random.Random."""
    words, stack = [], [*STORY]
    story = {}                              # its variables
    count = 1                               # ways that were as likely
    while stack:
        item = stack.pop()
        if isinstance(item, Words):
            words.append(item.text)
            continue
        found = ways(item, story)
        way = found[int(rng.random() * len(found))]
        count *= len(found)
        if item.name in KINDS:
            story[item.name] = way
        stack.extend(fill(item, way)[::-1])
    return "".join(words), -math.log(count)


class Parse(NamedTuple):
    log_p: float                     # of the text; -inf if it is not in the language
    end: int                         # characters that are right, if it is not
    expected: set                    # what they could go on with: name, thing, pronoun ..., "" for other words


def parse(text, starts=(STORY,), whole=True):
    """The Parse of a text that derives from one of `starts`; with whole=False, of any beginning of such a text."""
    found, end = [], -1
    expected = set()
    states = [(0, start, {}, 0.0) for start in starts]      # place in the text, what must follow, variables, log_p
    while states:
        place, rest, story, log_p = states.pop()
        if place == len(text) and not (rest and whole):
            found.append(log_p)
            continue
        item = rest[0] if rest else Words("\n")             # nothing may follow
        if isinstance(item, Slot):
            choices = ways(item, story)
            for way in choices:
                bound = {**story, item.name: way} if item.name in KINDS else story
                states.append((place, fill(item, way) + rest[1:], bound, log_p - math.log(len(choices))))
        elif text.startswith(item.text, place):
            states.append((place + len(item.text), rest[1:], story, log_p))
        elif item.text.startswith(text[place:]) and not whole:
            after = item.text[len(text) - place]
            if after == " " or after.isalpha() != text[-1].isalpha():       # the text ends with a word
                found.append(log_p)
        else:
            reached = place + len(os.path.commonprefix((text[place:], item.text)))
            if reached > end:
                end, expected = reached, set()
            if reached == end:
                expected.add(item.about)
    return Parse(math.log(sum(map(math.exp, found))) if found else -math.inf, end, expected)


def log_prob(text, whole=True):
    """log p of a story, or with whole=False of all stories that begin like this; -inf for what is no story."""
    return parse(text, whole=whole).log_p


class Verdict(NamedTuple):
    sentences: int                   # in the text
    right: int                       # that are in the language, each by itself
    consistent: bool                 # whether the text as a whole is a story
    broken: str                      # what goes wrong first: sentence, name, pronoun, thing, place ..., plot; or ""


@functools.lru_cache(100_000)
def is_sentence(text):
    return parse(text, SENTENCES).log_p > -math.inf


@functools.cache
def plots():
    """What a story of each plot is derived from."""
    return [read_template("{opening} {weather} " + plot) for plot in TEMPLATES["plot"]]


def plot_of(text):
    """The number of the plot that a text follows furthest; None if several are equal."""
    found = [parse(text, [start]) for start in plots()]
    ends = [(each.log_p, each.end) for each in found]
    return ends.index(max(ends)) if ends.count(max(ends)) == 1 else None


def judge(text):
    """The Verdict on a text. It is exact, for the rules that draw the stories decide."""
    sentences = END.split(text)
    right = [is_sentence(sentence) for sentence in sentences]
    found = parse(text)
    if found.log_p > -math.inf:
        return Verdict(len(sentences), sum(right), True, "")
    at = len(END.split(text[:found.end + 2])) - 1
    broken = what_is_wrong(text, found) if right[at] else "sentence"
    return Verdict(len(sentences), sum(right), False, broken)


def what_is_wrong(text, found):
    """Of what the text could have gone on with, the kind of the word that stands there; "plot" if that is unclear."""
    word = re.match(r"\W*(\w*)", text[text.rfind(" ", 0, found.end + 1) + 1:])[1]
    if KIND_OF_WORD.get(word) in found.expected:
        return KIND_OF_WORD[word]
    return "plot" if len(found.expected) > 1 else found.expected.pop() or "plot"


if __name__ == "__main__":
    for seed in range(4):
        text, log_p = draw(random.Random(seed))
        print(f"{text}\n({-log_p:.1f} nats)\n")
