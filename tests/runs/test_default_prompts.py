"""Prompts to start from: which they are, and that they can be read."""

import hashlib
import re

import pytest

from hsivi_diffusers.runs import default_prompts as module
from hsivi_diffusers.runs.default_prompts import default_prompts

CLIP_TOKENS = 77
PIECES = re.compile(r"'s|[a-z]+|[0-9]|[^\sa-z0-9]+", re.IGNORECASE)  # of which CLIP's tokenizer makes tokens


def test_they_are_the_same_everywhere():
    """A resumed run needs the prompts that it began with: whoever changes this hash says so in the changelog."""
    digest = hashlib.sha256("\n".join(default_prompts()).encode()).hexdigest()
    assert digest == "8ea48f19c6da8cc91840a590ac190e829430088908740d96144cc991cdd2632d"


def test_there_are_three_thousand_that_differ():
    assert len({prompt.lower() for prompt in default_prompts()}) == 3000


def test_they_have_all_lengths_up_to_what_clip_reads():
    lengths = [len(prompt.split()) for prompt in default_prompts()]
    assert (min(lengths), max(lengths)) == (3, 40)
    assert sum(length < 8 for length in lengths) > 500
    assert sum(length > 20 for length in lengths) > 250
    # The median word is 1 token and the worst prompt had 51; two ends are added.
    assert max(len(PIECES.findall(prompt)) for prompt in default_prompts()) + 2 <= 0.75 * CLIP_TOKENS


def test_they_are_in_plain_letters_and_in_one_line():
    for prompt in default_prompts():
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ,.:'-]+[A-Za-z0-9.]", prompt), prompt
        assert not re.search(r"  |\.\.|,,| ,|\ba [aeio]|\ban [^aeiouh]| a$", prompt.lower()), prompt


def test_every_hundred_have_all_kinds_of_subjects():
    """For the first ones are the columns of a sample grid, and a short run draws few of them."""
    for first in range(0, 3000, 100):
        part = default_prompts()[first : first + 100]
        for words, least in (("man|woman|boy|girl", 4), ("photo|photograph|portrait", 10), ("painting", 2)):
            assert sum(bool(re.search(rf"\b({words})\b", prompt)) for prompt in part) >= least
    openings = [" ".join(prompt.split()[:2]).lower() for prompt in default_prompts()]
    assert len({*openings}) > 900


@pytest.mark.parametrize("text", [text for _, text in module.KINDS])
def test_every_line_of_a_grammar_is_used(text):
    own = module._read(text)
    grammar = {**module._read(module.COMMON), **own, "bare": ["{subject}"]}
    used, new = set(), {"prompt"}
    while new:
        used |= new
        new = {name for each in new for option in grammar[each] for name in re.findall(r"\{(\w+)\}", option)} - used
    assert own.keys() <= used
    for name, options in own.items():
        words = [option for option in options if "{" not in option]
        assert len({*words}) == len(words), name


@pytest.mark.parametrize(
    ("text", "polished"),
    [
        ("a oil painting of a umbrella", "an oil painting of an umbrella"),
        ("a unicorn on a ukulele", "a unicorn on a ukulele"),
        ("^a old fox. soft light", "An old fox. Soft light."),
    ],
)
def test_articles_and_sentences_are_mended(text, polished):
    assert module._polish(text) == polished


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("a red fox", True),
        ("red fox", False),
        (" ".join(f"w{n}" for n in range(40)), True),
        (" ".join(f"w{n}" for n in range(41)), False),
        ("a red cup beside a red box", False),
        ("a close-up of a lake, wide view", False),
        ("pencil sketch of a boat, vivid colors", False),
        ("colored pencil drawing of a boat, vivid colors", True),
    ],
)
def test_prompts_that_contradict_themselves_are_left_out(text, fits):
    assert module._is_fit(text) == fits
