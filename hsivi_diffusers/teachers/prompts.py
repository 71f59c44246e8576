"""Prompts of a text-to-image teacher: encoded once, kept on the disk, and called by their number."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from inspect import signature
from typing import Any

import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel, UNet2DConditionModel
from diffusers.utils import is_bs4_available, is_ftfy_available
from huggingface_hub import cached_assets_path
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..runs.bars import bar
from ..runs.folders import in_turn
from ..runs.state_dicts import hash_weights

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
ZEROS = "force_zeros_for_empty_prompt"  # setting of SDXL
ADDED = ("text_embeds", "time_ids", "resolution", "aspect_ratio")  # go into added_cond_kwargs


class PromptTable:
    """What a network is told of prompts, by their number; the last row is the negative prompt, "no class" of guidance.

    Args:
        files: Tensors by argument of the network, each of shape (N, ...); those of a file stay on the disk.
        sizes: Further arguments, the same for all rows, each of shape (1, ...).
        digest: Names prompts and encoders.
        prompts: In the order of their numbers.
    """

    def __init__(
        self,
        files: Sequence[Mapping[str, Tensor]],
        sizes: Mapping[str, Tensor],
        digest: str = "",
        prompts: Sequence[str] = (),
    ) -> None:
        self.files, self.sizes, self.digest, self.prompts = files, sizes, digest, prompts
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


def encode_prompts(
    pipeline: DiffusionPipeline, prompts: Sequence[str], negative: str, size: tuple[int, int], device: torch.device
) -> PromptTable:
    """Encodes prompts by the encoders of a pipeline, as its own call does; longer ones are cut as there, and told.

    What is encoded is kept in the assets folder of huggingface_hub, in files named by encoders and prompts, so it is
    done once, and continues where it was stopped.

    Args:
        pipeline: Of a type in ENCODED. Its encoders are moved to the device, if there is something to encode, and back.
        prompts: In the order of their numbers.
        negative: The prompt that guidance leads away from; "" for none.
        size: Height and width of the images.
        device: Where to encode.
    """
    encoders = [part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part]
    digest = _digest_of_encoders(pipeline, encoders)
    folder = cached_assets_path("hsivi_diffusers", "prompts", digest[:16])
    starts = range(0, len(prompts), FILE_ROWS)
    chunks = [*(([*prompts[start : start + FILE_ROWS]], False) for start in starts), ([negative], True)]
    names = [hashlib.sha256(json.dumps(chunk).encode()).hexdigest() for chunk in chunks]
    paths = [folder / f"{name}.safetensors" for name in names]
    with in_turn(folder):  # one process encodes, the others find the files
        missing = [(path, *chunk) for path, chunk in zip(paths, chunks, strict=True) if not path.is_file()]
        with _moved(encoders if missing else [], device):
            for path, texts, are_negative in bar(missing, "encode prompts", leave=False, disable=not missing):
                partial = path.with_suffix(f".{os.getpid()}.partial")
                save_file(_encode(pipeline, texts, are_negative, device), partial)
                partial.replace(path)
    files = [load_file(path) for path in paths]  # mapped into memory
    digest = hashlib.sha256(f"{digest}{names}".encode()).hexdigest()
    return PromptTable(files, _sizes(pipeline, size), digest, prompts)


@contextmanager
def _moved(encoders: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Moves encoders to a device, and back at the end."""
    before = [next(encoder.parameters()).device for encoder in encoders]
    try:
        for encoder in encoders:
            encoder.to(device)
        yield
    finally:
        for encoder, place in zip(encoders, before, strict=True):
            encoder.to(place)


def _digest_of_encoders(pipeline: DiffusionPipeline, encoders: Sequence[Any]) -> str:
    """SHA-256 of all that the embedding of a prompt follows from."""
    parts = [part for name, part in sorted(pipeline.components.items()) if name.startswith("tokenizer") and part]
    tokenizers = [
        [part.get_vocab(), part.model_max_length, part.padding_side, part.special_tokens_map, _backend(part)]
        for part in parts
    ]
    configs = [{**encoder.config.to_dict(), "_name_or_path": None} for encoder in encoders]  # wherever it came from
    versions = [version(name) for name in ("diffusers", "transformers")]
    about = [
        kind_among(ENCODED, pipeline),
        {**pipeline.config}.get(ZEROS),
        _cleans(pipeline),
        versions,
        configs,
        tokenizers,
    ]
    hash = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for encoder in encoders:
        hash_weights(hash, encoder)
    return hash.hexdigest()


def _backend(tokenizer: Any) -> dict[str, Any] | None:
    """How a tokenizer of the library `tokenizers` splits and merges."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    return {**backend, "padding": None, "truncation": None}  # which the last call has set


def _cleans(pipeline: DiffusionPipeline) -> bool:
    """Whether the pipeline's own call cleans prompts: PixArt's does, with two libraries that may be missing."""
    return (
        "clean_caption" in signature(pipeline.encode_prompt).parameters and is_bs4_available() and is_ftfy_available()
    )


@torch.no_grad()
def _encode(
    pipeline: DiffusionPipeline, texts: Sequence[str], are_negative: bool, device: torch.device
) -> dict[str, Tensor]:
    """Returns what the network is told of texts, as prompts or as negative prompts."""
    kind, rows = str(kind_among(ENCODED, pipeline)), list[dict[str, Tensor]]()
    given: dict[str, Any] = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": are_negative}
    given |= {"clean_caption": True} if _cleans(pipeline) else {}
    for first in range(0, len(texts), BATCH):
        batch = [*texts[first : first + BATCH]]
        # Without a negative prompt SDXL takes zeros.
        without = None if kind == "StableDiffusionXLPipeline" and batch == [""] else batch
        encoded = pipeline.encode_prompt(prompt=batch, negative_prompt=without if are_negative else None, **given)
        rows.append({name: encoded[places[are_negative]].cpu() for name, *places in ENCODED[kind]})
    return {name: torch.cat([row[name] for row in rows]).contiguous() for name in rows[0]}


def takes_text(pipeline: DiffusionPipeline) -> bool:
    """Whether a pipeline is of a type in ENCODED."""
    return kind_among(ENCODED, pipeline) is not None


def kind_among(names: Collection[str], pipeline: DiffusionPipeline) -> str | None:
    """Which of some names of classes a pipeline goes by, its own or one that it was derived from; None if by none."""
    return next((each.__name__ for each in type(pipeline).__mro__ if each.__name__ in names), None)


def _sizes(pipeline: DiffusionPipeline, size: tuple[int, int]) -> dict[str, Tensor]:
    """What the network is told of the size of images: of an original of that size, without a crop."""
    height, width = size
    if kind_among(ENCODED, pipeline) == "StableDiffusionXLPipeline":
        return {"time_ids": torch.tensor([[height, width, 0.0, 0.0, height, width]])}
    if "transformer" in pipeline.components and pipeline.transformer.config.sample_size == 128:  # as PixArt's call
        return {"resolution": torch.tensor([[height, width]]), "aspect_ratio": torch.tensor([[height / width]])}
    return {}
