"""Scenes of two objects of Noto Color Emoji, such as "a red apple left of a clock on blue": endless captioned images.

Objects, relation, ground, sizes and places are random. Some pairs of objects are held out from all training.
"""

from __future__ import annotations

import hashlib
import io
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hsivi_diffusers.evaluation.images import to_model_range
from hsivi_diffusers.runs.bars import bar

from .sets import read_emoji

SCENES = "scenes"  # what --real_data calls these images
SIDE = 64  # pixels
SIZES = (20, 29)  # of an object in pixels, the last one excluded
COLORED = {  # code points by colour
    "heart": {"red": 0x2764, "orange": 0x1F9E1, "yellow": 0x1F49B, "green": 0x1F49A, "blue": 0x1F499},
    "circle": {"red": 0x1F534, "orange": 0x1F7E0, "yellow": 0x1F7E1, "green": 0x1F7E2, "blue": 0x1F535},
    "square": {"red": 0x1F7E5, "orange": 0x1F7E7, "yellow": 0x1F7E8, "green": 0x1F7E9, "blue": 0x1F7E6},
    "book": {"red": 0x1F4D5, "orange": 0x1F4D9, "green": 0x1F4D7, "blue": 0x1F4D8},
    "apple": {"red": 0x1F34E, "green": 0x1F34F},
}
PLAIN = {
    "anchor": 0x2693, "balloon": 0x1F388, "banana": 0x1F34C, "bee": 0x1F41D, "boat": 0x26F5, "bus": 0x1F68C,
    "butterfly": 0x1F98B, "cactus": 0x1F335, "cake": 0x1F370, "camera": 0x1F4F7, "car": 0x1F697, "cat": 0x1F431,
    "cherry": 0x1F352, "clock": 0x23F0, "crab": 0x1F980, "dog": 0x1F436, "donut": 0x1F369, "drum": 0x1F941,
    "egg": 0x1F95A, "fish": 0x1F420, "fox": 0x1F98A, "frog": 0x1F438, "guitar": 0x1F3B8, "house": 0x1F3E0,
    "key": 0x1F511, "lamp": 0x1F4A1, "lemon": 0x1F34B, "moon": 0x1F319, "mushroom": 0x1F344, "owl": 0x1F989,
    "panda": 0x1F43C, "pear": 0x1F350, "pizza": 0x1F355, "rocket": 0x1F680, "star": 0x2B50, "strawberry": 0x1F353,
    "tree": 0x1F333, "tulip": 0x1F337, "turtle": 0x1F422, "umbrella": 0x2614,
}  # fmt: skip
OBJECTS = {**{f"{color} {noun}": point for noun, of in COLORED.items() for color, point in of.items()}, **PLAIN}
NAMES = list(OBJECTS)
# Whether the objects are beside or above each other, and whether the one named first is the left or upper one.
RELATIONS = {"left of": (0, True), "right of": (0, False), "above": (1, True), "below": (1, False)}
GROUNDS = {
    "white": (250, 250, 250), "grey": (150, 150, 150), "black": (30, 30, 30), "pink": (255, 190, 205),
    "blue": (160, 200, 250), "green": (165, 220, 165), "yellow": (255, 240, 160), "purple": (205, 180, 235),
}  # fmt: skip
PRESENTATION = 0xFE0F  # asks for colour
HELD_OUT = 10  # one pair of objects in ten is held out
BATCH = 64  # images that are encoded at once


class Scene(NamedTuple):
    """Two different objects, numbers of NAMES, the relation of the first to the second, and the ground."""

    first: int
    second: int
    relation: str
    ground: str

    @property
    def caption(self) -> str:
        first, second = (f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in (NAMES[i] for i in self[:2]))
        return f"{first} {self.relation} {second} on {self.ground}"

    @classmethod
    def from_caption(cls, caption: str) -> Scene | None:
        """The scene of a caption; None if it is none of these."""
        for relation in RELATIONS:
            first, _, rest = caption.partition(f" {relation} ")
            second, _, ground = rest.rpartition(" on ")
            names = [each.partition(" ")[2] for each in (first, second)]
            if {*names} <= OBJECTS.keys() and ground in GROUNDS:
                scene = cls(NAMES.index(names[0]), NAMES.index(names[1]), relation, ground)
                return scene if scene.caption == caption else None
        return None

    @property
    def held_out(self) -> bool:
        """Whether its pair of objects is held out, by a hash of their names."""
        names = " and ".join(sorted(NAMES[each] for each in self[:2]))
        return int.from_bytes(hashlib.sha256(names.encode()).digest()[:4], "big") % HELD_OUT == 0

    @property
    def labels(self) -> list[int]:
        """What is seen in the image: axis, left or upper object, right or lower object, ground, as numbers."""
        axis, in_order = RELATIONS[self.relation]
        pair = self[:2] if in_order else self[1::-1]
        return [axis, *pair, list(GROUNDS).index(self.ground)]


# The number of values of each of `Scene.labels`.
KINDS = (2, len(NAMES), len(NAMES), len(GROUNDS))


def draw_scenes(number: int, held_out: bool | None, random: np.random.Generator) -> list[Scene]:
    """Draws scenes uniformly: of pairs that are held out, of others, or by None of all."""
    scenes: list[Scene] = []
    most = [len(NAMES), len(NAMES) - 1, len(RELATIONS), len(GROUNDS)]
    while len(scenes) < number:
        first, other, relation, ground = random.integers(most).tolist()
        second = other + (other >= first)
        scene = Scene(first, second, [*RELATIONS][relation], [*GROUNDS][ground])
        if held_out is None or scene.held_out == held_out:
            scenes.append(scene)
    return scenes


@cache
def load_glyphs() -> list[Image.Image]:
    """The image of each object, RGBA, without an empty border."""
    bitmaps = {points[0]: bitmap for bitmap, points in read_emoji().items() if points[1:] in ((), (PRESENTATION,))}
    glyphs = [Image.open(io.BytesIO(bitmaps[point])).convert("RGBA") for point in OBJECTS.values()]
    return [glyph.crop(glyph.getchannel("A").getbbox()) for glyph in glyphs]


@cache
def _object(number: int, size: int) -> Image.Image:
    """An object, resized so that its longer side has `size` pixels."""
    glyph = load_glyphs()[number]
    share = size / max(glyph.size)
    return glyph.resize((max(round(glyph.width * share), 1), max(round(glyph.height * share), 1)), Image.Resampling.BOX)


def render(scene: Scene, random: np.random.Generator) -> Image.Image:
    """Draws an image of a scene: along the axis the objects do not overlap, across it they are less far apart."""
    image = Image.new("RGBA", (SIDE, SIDE), GROUNDS[scene.ground])
    axis, *pair, _ = scene.labels
    objects = [_object(number, int(random.integers(*SIZES))) for number in pair]
    along = [each.size[axis] for each in objects]
    first = int(random.integers(0, SIDE - sum(along) + 1))
    second = int(random.integers(first + along[0], SIDE - along[1] + 1))
    apart = second + along[1] / 2 - first - along[0] / 2
    while True:
        across = [int(random.integers(0, SIDE - each.size[1 - axis] + 1)) for each in objects]
        middles = [place + each.size[1 - axis] / 2 for place, each in zip(across, objects, strict=True)]
        if abs(middles[1] - middles[0]) <= apart / 2:
            break
    for each, place in zip(objects, zip((first, second), across, strict=True), strict=True):
        image.alpha_composite(each, place if axis == 0 else place[::-1])
    return image.convert("RGB")


def render_all(scenes: list[Scene], random: np.random.Generator) -> Tensor:
    """Images of scenes, uint8 of shape (N, 3, SIDE, SIDE)."""
    images = np.stack([np.asarray(render(scene, random)) for scene in bar(scenes, "scenes")])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def make_scenes(number: int, seed: int, held_out: bool | None = False) -> tuple[Tensor, list[Scene]]:
    """Draws scenes, see `draw_scenes`, and their images, uint8 of shape (N, 3, SIDE, SIDE)."""
    random = np.random.default_rng(seed)
    scenes = draw_scenes(number, held_out, random)
    return render_all(scenes, random), scenes


@torch.no_grad()
def encode(vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of the scaled latents of images, uint8, in bfloat16."""
    shift, factor = vae.config.shift_factor, vae.config.scaling_factor
    means, stds = [], []
    for batch in bar(images.split(BATCH), "latents"):
        law = vae.encode(to_model_range(batch.to(vae.device))).latent_dist
        means.append(((law.mean - shift) * factor).bfloat16())
        stds.append((law.std * factor).bfloat16())
    return torch.cat(means), torch.cat(stds)
