"""fables.py: one grammar draws, measures and judges, and its numbers are exact."""
import hashlib
import math
import random
import re

import fables
import pytest

WORD = re.compile(r" ?[A-Za-z]+| ?[^\sA-Za-z]+")
STORIES = [fables.draw(random.Random(seed)) for seed in range(1500)]
TALE = ('Once there was a small dog named Ruth. Snow lay on the fields. One day Ruth lost her bell. She went to the '
        'lake to look for it. There she met Max, an otter. "Have you seen my bell?" asked Ruth. "I saw it under a '
        'stone," said Max. They found the bell under a stone, and Ruth was glad. Who asks will find.')
BROKEN = [                                  # what is changed in the tale, into what, and what must be found
    ("named Ruth", "named Otto", "name"), ("lost her", "lost his", "sentence"), ("She went", "He went", "pronoun"),
    ("There she", "There he", "pronoun"), ("asked Ruth", "asked Max", "name"), ("said Max", "said Tom", "name"),
    ("my bell", "my kite", "thing"), ("the bell under", "the book under", "thing"), ("and Ruth", "and Max", "name"),
    ("They found the bell under a stone", "They found the bell on the road", "spot"), ("Ruth lost", "Mia lost", "name"),
    ("an otter", "a otter", "sentence"), ("the lake to", "the bell to", "sentence"),
    ("small dog", "dog small", "sentence"),
    ("Snow lay on the fields. ", "Snow lay the fields. ", "sentence"), ("look for it.", "look for.", "sentence"),
    ("Who asks will find.", "Nobody believes a liar.", "plot"), ('"Have you seen my bell?" asked Ruth. ', "", "plot"),
    ("Snow lay on the fields. ", "Snow lay on the fields. It had rained all night. ", "plot"),
    ("There she met Max, an otter. ", "", "plot"),
    ("Who asks will find.", "Who asks will find. Since that day", "sentence")]


def test_the_readable_tale_is_right():
    assert fables.judge(TALE) == (9, 9, True, "")
    assert -math.inf < fables.log_prob(TALE) < -20


@pytest.mark.parametrize("before, after, broken", BROKEN)
def test_what_is_broken_is_found_and_named(before, after, broken):
    assert TALE.count(before) == 1
    verdict = fables.judge(TALE.replace(before, after))
    assert (verdict.consistent, verdict.broken) == (False, broken)
    assert (verdict.right < verdict.sentences) == (broken == "sentence")


@pytest.mark.parametrize("text", ["", " ", "\n", "Ruth", "a story of something else", '"" " .', "é 中 \0", TALE + " ",
                                  TALE[:-1], TALE.lower(), TALE + " " + TALE])
def test_anything_else_is_no_story(text):
    verdict = fables.judge(text)
    assert not verdict.consistent and verdict.broken and fables.log_prob(text) == -math.inf


def test_a_seed_gives_the_same_stories_for_ever():
    digest = hashlib.sha256("\n".join(story for story, _ in STORIES[:1000]).encode()).hexdigest()
    assert digest[:16] == "c15abf6cceff1637"


def test_the_text_alone_has_the_probability_with_which_it_was_drawn():
    """So no two derivations give one text: the parser would have added them."""
    for story, log_p in STORIES:
        assert fables.log_prob(story) == pytest.approx(log_p, abs=1e-9), story


def test_two_derivations_of_one_text_are_added(monkeypatch):
    monkeypatch.setitem(fables.RULES, ("truth", " "), 2 * fables.RULES["truth", " "])
    story, log_p = next(pair for pair in STORIES if pair[0].endswith("Always tell the truth."))
    assert fables.log_prob(story) == pytest.approx(log_p, abs=1e-9)


def test_every_story_is_right():
    for story, _ in STORIES[:300]:
        verdict = fables.judge(story)
        assert verdict == (len(fables.END.split(story)), verdict.sentences, True, ""), story


def test_the_plot_of_a_text_is_known_even_if_it_breaks_off():
    plots = [template.split()[0].strip("{}") for template in fables.TEMPLATES["plot"]]
    assert plots[fables.plot_of(TALE)] == plots[fables.plot_of(TALE.replace("said Max", "said Tom"))] == "loss"
    assert plots[fables.plot_of(TALE[:120])] == "loss" and fables.plot_of("Ruth") is None and fables.plot_of("") is None
    found = {fables.plot_of(story) for story, _ in STORIES[:100]}
    assert found == set(range(len(plots)))


def test_every_alternative_is_used_and_no_rule_has_one_twice():
    text = " ".join(fables.draw(random.Random(seed))[0] for seed in range(6000))
    for name, templates in fables.TEMPLATES.items():
        assert len({*templates}) == len(templates), name
        parts = [part for items in fables.RULES[name, ""] for part in items if isinstance(part, fables.Words)]
        assert all(part.text in text for part in parts), name
    for values in fables.VALUES.values():
        assert all(value in text for value in values)


def test_the_language_is_as_rich_as_it_was_planned():
    words = {word.lower() for story, _ in STORIES for word in re.findall("[A-Za-z]+", story)}
    assert 400 <= len(words) <= 600 and len(fables.TEMPLATES["plot"]) >= 8
    assert max(len(WORD.findall(story)) for story, _ in STORIES) + 2 <= 96         # a window of config/tiny.py
    assert len({story for story, _ in STORIES}) == len(STORIES)


def test_the_entropy_is_known_to_a_thousandth():
    """Of 20,000 stories; the standard error over 100,000 follows from their spread."""
    rng = random.Random(0)
    nats = [-fables.draw(rng)[1] for _ in range(20_000)]
    mean = sum(nats) / len(nats)
    spread = math.sqrt(sum((x - mean) ** 2 for x in nats) / len(nats))
    assert 30 < mean < 36 and spread / math.sqrt(1e5) < 1e-3 * mean


def test_the_probabilities_of_what_may_follow_add_up():
    """p(beginning) is the sum of p(beginning + word) over all words, and of p(it is the end)."""
    story = TALE
    words = WORD.findall(story)
    vocabulary = {word for text, _ in STORIES for word in WORD.findall(text)}
    for n in (1, 2, 9, 17, 30, 41, 53, 66, len(words) - 5, len(words)):
        begun = "".join(words[:n])
        after = sum(math.exp(fables.log_prob(begun + word, whole=False)) for word in vocabulary)
        here = math.exp(fables.log_prob(begun, whole=False))
        assert after + math.exp(fables.log_prob(begun)) == pytest.approx(here, rel=1e-9), begun
    first = sum(math.exp(fables.log_prob(word, whole=False)) for word in vocabulary)
    assert first == pytest.approx(1, rel=1e-9)
