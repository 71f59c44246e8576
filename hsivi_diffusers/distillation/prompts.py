"""Prompts of a text-to-image teacher: encoded once, kept on the disk, and called by their number."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel, UNet2DConditionModel
from huggingface_hub import cached_assets_path
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from .state_dicts import hash_weights

FILE_ROWS = 512  # prompts of a file
BATCH = 32  # prompts that are encoded at once
# Of what a pipeline's encode_prompt returns: argument of the network, place of the prompt, place of the negative one.
SD, SDXL = [("encoder_hidden_states", 0, 1)], [("encoder_hidden_states", 0, 1), ("text_embeds", 2, 3)]
PIXART = [("encoder_hidden_states", 0, 2), ("encoder_attention_mask", 1, 3)]
ENCODED = {
    "StableDiffusionPipeline": SD,
    "StableDiffusionXLPipeline": SDXL,
    "PixArtAlphaPipeline": PIXART,
    "PixArtSigmaPipeline": PIXART,
}
ADDED = ("text_embeds", "time_ids", "resolution", "aspect_ratio")  # go into added_cond_kwargs


class PromptTable:
    """What a network is told of prompts, by their number; the last row is the negative prompt, "no class" of guidance.

    Args:
        files: Tensors by argument of the network, each of shape (N, ...); those of a file stay on the disk.
        sizes: Further arguments, the same for all rows, each of shape (1, ...).
        digest: Names prompts and encoders.
    """

    def __init__(self, files: Sequence[Mapping[str, Tensor]], sizes: Mapping[str, Tensor], digest: str = "") -> None:
        self.files, self.sizes, self.digest = files, sizes, digest
        counts = [len(next(iter(file.values()))) for file in files]
        self._places = [(file, place) for file, count in zip(files, counts, strict=True) for place in range(count)]

    def __len__(self) -> int:
        return len(self._places)

    def __deepcopy__(self, memo: Any) -> PromptTable:
        return self

    def arguments(self, condition: Tensor, like: Tensor) -> dict[str, Any]:
        """Returns the keyword arguments of the network for rows of numbers (B,), of the type and device of a tensor."""
        chosen = [self._places[row] for row in condition.tolist()]
        rows = {name: torch.stack([file[name][place] for file, place in chosen]) for name in self.files[0]}
        rows |= {name: size.expand(len(chosen), -1) for name, size in self.sizes.items()}
        given: dict[str, Any] = {name: row.to(like.device, like.dtype) for name, row in rows.items()}
        added = {name: given.pop(name) for name in ADDED if name in given}
        return {**given, "added_cond_kwargs": added} if added else given


def empty_prompts(network: Any) -> PromptTable | None:
    """Returns prompts without a content, of the shapes that a network is told, for a plan; None if it takes no text."""
    config, shapes = network.config, dict[str, tuple[int, ...]]()
    if isinstance(network, UNet2DConditionModel):
        width = config.cross_attention_dim  # of all blocks, or of each
        shapes |= {"encoder_hidden_states": (77, width if isinstance(width, int) else width[0])}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            shapes |= {"text_embeds": (pooled,), "time_ids": (6,)}
    elif isinstance(network, PixArtTransformer2DModel):
        shapes |= {"encoder_hidden_states": (300, config.caption_channels), "encoder_attention_mask": (300,)}
        if network.use_additional_conditions:
            shapes |= {"resolution": (2,), "aspect_ratio": (1,)}
    else:
        return None
    return PromptTable([{name: torch.zeros(2, *shape, device="cpu") for name, shape in shapes.items()}], {})


def read_prompts(prompts: str | Sequence[str]) -> list[str]:
    """Returns prompts that are given as a list, or as the path of a text file with one in a line.

    Raises:
        ValueError: There is no such file, or there are no prompts.
    """
    if isinstance(prompts, str):
        path = Path(prompts)
        if not path.is_file():
            raise ValueError(f"prompts={prompts!r} is no file: give the path of a text file with one prompt in a line")
        prompts = path.read_text(encoding="utf-8").splitlines()
    found = [stripped for prompt in prompts if (stripped := prompt.strip())]
    if not found:
        raise ValueError("prompts has no text: give at least one prompt, in a list or a text file")
    return found


def encode_prompts(
    pipeline: DiffusionPipeline, prompts: Sequence[str], negative: str, size: tuple[int, int], device: torch.device
) -> PromptTable:
    """Encodes prompts by the encoders of a pipeline, as its own call does; longer ones are cut as there, and told.

    What is encoded is kept in the assets folder of huggingface_hub, in files named by encoders and prompts, so it is
    done once, and continues where it was stopped.

    Args:
        pipeline: Of a type in ENCODED. Its encoders are moved to the device, and back.
        prompts: In the order of their numbers.
        negative: The prompt that guidance leads away from; "" for none.
        size: Height and width of the images.
        device: Where to encode.
    """
    encoders = {name: part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part}
    digest = _digest_of_encoders(pipeline, encoders)
    folder = cached_assets_path("hsivi_diffusers", "prompts", digest[:16])
    before = {name: part.device for name, part in encoders.items()}
    starts = range(0, len(prompts), FILE_ROWS)
    chunks = [*(prompts[start : start + FILE_ROWS] for start in starts), None]  # None is for the negative prompt
    names = [hashlib.sha256(json.dumps([chunk, negative]).encode()).hexdigest() for chunk in chunks]
    files = []
    for chunk, name in zip(tqdm(chunks, "encode prompts", leave=False), names, strict=True):
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            for encoder in encoders.values():
                encoder.to(device)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            save_file(_encode(pipeline, chunk, negative, device), partial)
            partial.replace(path)
        files.append(load_file(path))  # mapped into memory
    for name, encoder in encoders.items():
        encoder.to(before[name])
    return PromptTable(files, _sizes(pipeline, size), hashlib.sha256(f"{digest}{names}".encode()).hexdigest())


def _digest_of_encoders(pipeline: DiffusionPipeline, encoders: Mapping[str, Any]) -> str:
    hash = hashlib.sha256(type(pipeline).__name__.encode())
    for encoder in encoders.values():
        hash_weights(hash, encoder)
    for name, part in sorted(pipeline.components.items()):
        if name.startswith("tokenizer") and part is not None:
            vocabulary = [part.model_max_length, part.init_kwargs.get("padding_side"), part.get_vocab()]
            hash.update(json.dumps(vocabulary, sort_keys=True).encode())
    return hash.hexdigest()


@torch.no_grad()
def _encode(
    pipeline: DiffusionPipeline, prompts: Sequence[str] | None, negative: str, device: torch.device
) -> dict[str, Tensor]:
    """Returns what the network is told of prompts, or, of None, of the negative one."""
    kind = str(_kind_of(pipeline))
    rows: dict[str, list[Tensor]] = {name: [] for name, *_ in ENCODED[kind]}
    for batch in _batches(prompts or [""]):
        without = [negative] * len(batch) if negative or kind != "StableDiffusionXLPipeline" else None  # zeros there
        given = {"prompt": batch, "negative_prompt": without, "device": device, "num_images_per_prompt": 1}
        encoded = pipeline.encode_prompt(**given, do_classifier_free_guidance=True)
        for name, of_prompt, of_negative in ENCODED[kind]:
            rows[name].append(encoded[of_negative if prompts is None else of_prompt].cpu())
    return {name: torch.cat(row).contiguous() for name, row in rows.items()}


def _batches(prompts: Sequence[str]) -> Iterator[list[str]]:
    for first in range(0, len(prompts), BATCH):
        yield [*prompts[first : first + BATCH]]


def takes_text(pipeline: DiffusionPipeline) -> bool:
    """Whether a pipeline is of a type in ENCODED."""
    return _kind_of(pipeline) is not None


def _kind_of(pipeline: DiffusionPipeline) -> str | None:
    return next((each.__name__ for each in type(pipeline).__mro__ if each.__name__ in ENCODED), None)


def _sizes(pipeline: DiffusionPipeline, size: tuple[int, int]) -> dict[str, Tensor]:
    """What the network is told of the size of images: of an original of that size, without a crop."""
    height, width = size
    if _kind_of(pipeline) == "StableDiffusionXLPipeline":
        return {"time_ids": torch.tensor([[height, width, 0.0, 0.0, height, width]])}
    if "transformer" in pipeline.components and pipeline.transformer.config.sample_size == 128:  # as PixArt's call
        return {"resolution": torch.tensor([[height, width]]), "aspect_ratio": torch.tensor([[height / width]])}
    return {}
