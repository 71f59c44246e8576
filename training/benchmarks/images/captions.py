"""Noto Color Emoji with their English names: images and captions, of which some combinations are held out.

A name has one image. So the words that several names share are prompts, too: of "cat" or "dark" there are many images.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from .sets import load_images, read_emoji
from .spaces import CaptionMeasures, load_classifier

# Where Debian's package unicode-cldr-core puts the names, licensed as Unicode-3.0.
CLDR = Path("/usr/share/unicode/cldr/common")
CAPTIONS = "captions"  # what --real_data calls these images
HELD_OUT = 50  # captions that are not trained
SHARED = 6  # images of a word that is a prompt
EACH = 40  # real images of a prompt that a benchmark compares with, of few some more than once
WORD = re.compile(r"[^\W\d_]{3,}")
NO_PROMPTS = {"and", "the", "with"}
PRESENTATION = "\ufe0f"  # asks for colour, and is in some sequences of a font and not in the names
TONE = " skin tone"
BATCH = 64  # images that are encoded at once


def load_captioned(resolution: int) -> tuple[torch.Tensor, list[str]]:
    """Loads the emoji that have a name: images, uint8 of shape (N, 3, resolution, resolution), and captions.

    Raises:
        ValueError: The font or the names are missing.
    """
    names = read_names()
    images, _ = load_images("emoji", resolution, 3)
    keys = ["".join(map(chr, points)).replace(PRESENTATION, "") for points in read_emoji().values()]
    rows = [row for row, key in enumerate(keys) if key in names]
    return images[rows], [names[keys[row]] for row in rows]


def read_names() -> dict[str, str]:
    """Reads the English name of each emoji, by its code points."""
    files = [CLDR / folder / "en.xml" for folder in ("annotations", "annotationsDerived")]
    if missing := [file for file in files if not file.is_file()]:
        raise ValueError(f"{missing[0]} is missing: install the package unicode-cldr-core")
    names: dict[str, str] = {}
    for file in files:
        for each in ElementTree.parse(file).iter("annotation"):
            if each.get("type") == "tts":
                names[str(each.get("cp")).replace(PRESENTATION, "")] = str(each.text)
    return names


def hold_out(captions: list[str]) -> tuple[list[int], list[int]]:
    """Splits captions into those to train on and HELD_OUT that are not; returns their rows.

    Held out are new combinations of what is known: captions of one skin tone, "firefighter: light skin tone", whose
    subject is trained in other tones. At most one tone of a subject is held out, by a hash of the caption.

    Raises:
        ValueError: There are fewer such captions.
    """
    toned = [row for row, caption in enumerate(captions) if caption.endswith(TONE) and caption.count(":") == 1]
    toned = [row for row in toned if "," not in captions[row]]
    chosen: dict[str, int] = {}
    for row in sorted(toned, key=lambda row: hashlib.sha256(captions[row].encode()).digest()):
        chosen.setdefault(captions[row].split(":")[0], row)
    held = [*chosen.values()][:HELD_OUT]
    if len(held) < HELD_OUT:
        raise ValueError(f"{len(held)} captions can be held out, and {HELD_OUT} were asked for")
    return sorted({*range(len(captions))} - {*held}), held


def shared_words(captions: list[str]) -> dict[str, list[int]]:
    """Returns the words that SHARED or more of the captions to train on have, each with their rows."""
    found: dict[str, list[int]] = {}
    for row in hold_out(captions)[0]:
        for word in {*WORD.findall(captions[row].lower())} - NO_PROMPTS:
            found.setdefault(word, []).append(row)
    return {word: rows for word, rows in sorted(found.items()) if len(rows) >= SHARED}


def pair(captions: list[str]) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Returns prompts, and what is trained on: pairs of an image and a prompt of it, rows and numbers of shape (M,).

    The prompts are the captions and their `shared_words`; a caption that is such a word counts as the word. No pair has
    an image or a caption that is held out.
    """
    words = shared_words(captions)
    pairs = [(row, row) for row in hold_out(captions)[0] if captions[row].lower() not in words]
    pairs += [(row, number) for number, rows in enumerate(words.values(), len(captions)) for row in rows]
    rows, numbers = torch.tensor(pairs).T
    return [*captions, *words], rows, numbers


def rivals(captions: list[str], held: list[int]) -> list[int]:
    """Returns the rows of captions that are taken for those held out by who does not see their tone.

    They have the subject of one that is held out, and another tone, or none.
    """
    subjects = {captions[row].split(":")[0] for row in held}
    return [row for row, caption in enumerate(captions) if row not in held and caption.split(":")[0] in subjects]


def choose(captions: list[str]) -> tuple[list[int], list[str], list[int]]:
    """Returns what a benchmark draws and compares with.

    Returns:
        The rows of the captions that are held out; the prompts, these captions and then the `shared_words`; and the
        rows of their real images, EACH of each prompt: of prompt i those at i, i + P, i + 2 P, with P prompts. They
        are the same each time, and of a word with more images a part.
    """
    held = hold_out(captions)[1]
    images = [[row] for row in held]
    words, generator = shared_words(captions), torch.Generator().manual_seed(0)
    images += [[rows[place] for place in torch.randperm(len(rows), generator=generator)] for rows in words.values()]
    prompts = [*(captions[row] for row in held), *words]
    return held, prompts, [of_prompt[turn % len(of_prompt)] for turn in range(EACH) for of_prompt in images]


class CaptionedEmoji:
    """What a benchmark draws and compares with, see `choose`.

    Attributes:
        prompts: Those held out first.
        images: Real images of each prompt in turn, uint8 of shape (N, 3, H, W).
        max_sequence_length: Of the teacher's pipeline, None for its own.
    """

    max_sequence_length = None

    def __init__(self, resolution: int) -> None:
        images, captions = load_captioned(resolution)
        self.held_out, self.prompts, rows = choose(captions)
        self.images, self._rivals = images[rows], rivals(captions, self.held_out)

    def measures(self, classifier: Path) -> CaptionMeasures:
        """How images suit the prompts, by the folder of the scorer."""
        return CaptionMeasures(load_classifier(classifier), self.held_out, self._rivals)


@torch.no_grad()
def encode(vae: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std of the scaled latents of images in [-1, 1]."""
    laws = [vae.encode(batch).latent_dist for batch in images.split(BATCH)]
    mean, std = (torch.cat([getattr(law, name) for law in laws]) for name in ("mean", "std"))
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    return (mean - shift) * scale, std * scale
