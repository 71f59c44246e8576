"""Prompts of a text-to-image teacher: encoded once, kept on the disk, and called by their number."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import is_bs4_available, is_ftfy_available
from huggingface_hub import cached_assets_path
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..pipeline_hsivi import check_finite_weights
from ..runs.bars import bar
from ..runs.folders import in_turn
from ..runs.state_dicts import hash_weights, load_tensors, save_tensors

BATCH = 32  # prompts that are encoded at once
SHA256 = "sha256"  # entry of a file of the cache: that of its tensors


class PromptTable:
    """What a network gets for prompts, by their number; the last row is the negative prompt, "no class" of guidance.

    Args:
        files: Tensors by argument of the network, each of shape (N, ...); those of a file stay on the disk. Where
            prompts have lengths of their own, (N, L, ...), L differs between files, and rows are padded by zeros.
        sizes: Further arguments, the same for all rows, each of shape (1, ...).
        digest: Identifies prompts and encoders.
        prompts: In the order of their numbers.
    """

    has_null = True

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

    @property
    def rows(self) -> int:
        """Prompts, with the negative one."""
        return len(self._places)

    def arguments(self, condition: Tensor, like: Tensor) -> dict[str, Tensor]:
        """Returns arguments of the network for rows of numbers (B,), of the dtype and device of a tensor.

        Numbers on the CPU, where the tables are, cost no wait for a GPU.
        """
        chosen = [self._places[row] for row in condition.tolist()]
        rows = {name: padded([file[name][place] for file, place in chosen]) for name in self.files[0]}
        rows |= {name: size.expand(len(chosen), -1) for name, size in self.sizes.items()}
        return {name: row.to(like.device, like.dtype, non_blocking=True) for name, row in rows.items()}

    def lengths(self, mask: str, condition: Tensor) -> list[int]:
        """Returns the number of tokens of each row, by the name of the mask, without a wait for a GPU."""
        chosen = [self._places[row] for row in condition.tolist()]
        return [int(file[mask][place].sum(dtype=torch.float32)) for file, place in chosen]  # bfloat16 ends at 256


def padded(rows: Sequence[Tensor]) -> Tensor:
    """Returns tensors (L, ...) as one of shape (N, longest L, ...), with zeros at the ends of shorter ones."""
    return pad_sequence([*rows], batch_first=True)


def encode_prompts(teacher: Any, prompts: Sequence[str], negative: str, device: torch.device) -> PromptTable:
    """Encodes prompts by the encoders of a teacher's pipeline, as its own call does, which cuts long ones.

    The encoded prompts are kept in the assets folder of huggingface_hub, in files named by encoders and prompts. So
    they are encoded once, encoding continues where it was stopped, and no encoder is loaded where nothing is missing.
    A file that is damaged is made again.

    Args:
        teacher: Of a kind that takes text, see `latents.TextLatents`.
        prompts: In the order of their numbers.
        negative: The negative prompt of guidance; "" for none.
        device: Where to encode.
    """
    digest = teacher.encoders_digest()
    if teacher.schedule.config.max_sequence_length is not None:
        digest = hashlib.sha256(f"{digest}{teacher.longest}".encode()).hexdigest()
    if teacher.prompt_dtype is not None:
        digest = hashlib.sha256(f"{digest}{teacher.prompt_dtype}".encode()).hexdigest()
    folder = cached_assets_path("hsivi_diffusers", "prompts", digest[:16])
    rows = teacher.prompts_of_file
    starts = range(0, len(prompts), rows)
    chunks = [*(([*prompts[start : start + rows]], False) for start in starts), ([negative], True)]
    names = [hashlib.sha256(json.dumps(chunk).encode()).hexdigest() for chunk in chunks]
    paths = [folder / f"{name}.safetensors" for name in names]
    with in_turn(folder):  # one process encodes, the others find the files
        for unfinished in folder.glob("*.partial"):  # of a process that was killed
            unfinished.unlink()
        missing = [(path, *chunk) for path, chunk in zip(paths, chunks, strict=True) if not _is_whole(path)]
        if missing:
            with _on_device(teacher.load_encoders(), device) as encoders:
                pipeline = teacher.like(**encoders)
                for path, texts, are_negative in bar(missing, "encode prompts", leave=False):
                    _write(path, _encode(teacher, pipeline, texts, are_negative, device))
    files = [load_tensors(path) for path in paths]  # mapped into memory
    if teacher.schedule.config.max_sequence_length is not None and len({*prompts[:2]}) == 2:
        _check_differ(files[0], teacher.longest)
    digest = hashlib.sha256(f"{digest}{names}".encode()).hexdigest()
    return PromptTable(files, teacher.sizes(), digest, prompts)


def _check_differ(file: Mapping[str, Tensor], longest: int) -> None:
    """Refuses prompts that are all the same once they are cut: a pipeline may write a template before each."""
    if all(row.equal(rows[0]) for rows in file.values() for row in rows):
        raise ValueError(
            f"max_sequence_length={longest} leaves nothing of the prompts that tells them apart: give more, for the "
            "template of the pipeline counts, or leave it out"
        )


def _is_whole(path: Path) -> bool:
    """Whether a file of the cache has the tensors that were written to it."""
    try:
        with safe_open(path, "pt") as file:
            written = (file.metadata() or {}).get(SHA256)
            return written == _sha256({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError):
        return False


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(save(dict(tensors))).hexdigest()


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a file that is on the disk whole before it has its name."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_tensors(tensors, partial, {SHA256: _sha256(tensors)})
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)


@contextmanager
def _on_device(encoders: Mapping[str, Any], device: torch.device) -> Iterator[Mapping[str, Any]]:
    """Moves encoders to a device, and back at the end."""
    parts: dict[str, nn.Module] = {name: part for name, part in encoders.items() if part is not None}
    before = {name: next(part.parameters()).device for name, part in parts.items()}
    try:
        for name, part in parts.items():
            check_finite_weights(part, name)
            part.to(device)
        yield encoders
    finally:
        for name, place in before.items():
            parts[name].to(place)


def digest_of(kind: str, pipeline: Any, encoders: Mapping[str, str]) -> str:
    """Returns the SHA-256 of all that the embedding of a prompt follows from.

    Args:
        kind: Name of the class of the pipeline.
        pipeline: With tokenizers.
        encoders: A digest of each text encoder, by name.
    """
    given = [part for name, part in sorted(pipeline.components.items()) if name.startswith("tokenizer") and part]
    parts = [getattr(part, "tokenizer", part) for part in given]  # a processor has one
    templates = [part.chat_template for part in given if getattr(part, "chat_template", None)]
    tokenizers = [
        [part.get_vocab(), part.model_max_length, part.padding_side, part.special_tokens_map, _backend(part)]
        for part in parts
    ]
    versions = [version(name) for name in ("diffusers", "transformers")]
    zeros = {**pipeline.config}.get("force_zeros_for_empty_prompt")  # of SDXL
    about = [kind, zeros, cleans(pipeline), versions, sorted(encoders.items()), tokenizers, *templates]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def digest_of_module(module: Any) -> str:
    """Returns the SHA-256 of the config and weights of an encoder in memory."""
    config = {**module.config.to_dict(), "_name_or_path": None}  # wherever it came from
    hash = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    hash_weights(hash, module)
    return hash.hexdigest()


def digest_of_folder(folder: Path) -> str:
    """Returns the SHA-256 of the files of an encoder, which is not loaded.

    In the cache of huggingface_hub a file of weights is a link to one that is named by its SHA-256.
    """
    hash = hashlib.sha256()
    for path in sorted(filter(Path.is_file, folder.iterdir())):
        if not {*path.name.split(".")[1:]} <= {
            "json",
            "index",
            "safetensors",
            "bin",
        }:  # of another variant, such as fp16
            continue
        target = path.resolve()
        named = target.parent.name == "blobs" and len(target.name) == 64
        hash.update(f"{path.name} {target.name if named else _sha256_of_file(target)}\n".encode())
    return hash.hexdigest()


def _sha256_of_file(path: Path) -> str:
    """Returns the SHA-256 of a file, which is kept as long as its size and time of change stay: encoders are large."""
    stat = path.stat()
    key = hashlib.sha256(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()
    kept = cached_assets_path("hsivi_diffusers", "prompts", "files") / key
    if kept.is_file() and len(known := kept.read_text()) == len(key):
        return known
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    partial = kept.with_name(f"{key}.{os.getpid()}")  # other processes may write it, too
    partial.write_text(digest)
    partial.replace(kept)
    return digest


def _backend(tokenizer: Any) -> dict[str, Any] | None:
    """How a tokenizer of the library `tokenizers` splits and merges."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    return {**backend, "padding": None, "truncation": None}  # which the last call has set


def cleans(pipeline: Any) -> bool:
    """Whether the pipeline's own call cleans prompts: PixArt's does, with two libraries that may be missing."""
    usual = signature(type(pipeline).__call__).parameters.get("clean_caption")
    return usual is not None and usual.default is True and is_bs4_available() and is_ftfy_available()


@torch.no_grad()
def _encode(
    teacher: Any, pipeline: Any, texts: Sequence[str], are_negative: bool, device: torch.device
) -> dict[str, Tensor]:
    """Returns what the network gets for texts, as prompts or as negative prompts."""
    rows = list[dict[str, Tensor]]()
    given: dict[str, Any] = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": are_negative}
    given |= {"prompt_2": None, "prompt_3": None}  # by default the prompt itself
    given |= {"clean_caption": True} if cleans(pipeline) else {}
    known = signature(pipeline.encode_prompt).parameters
    given |= {"max_sequence_length": teacher.longest, **teacher.encoding()}
    for first in range(0, len(texts), BATCH):
        batch = [*texts[first : first + BATCH]]
        given |= {"negative_prompt": teacher.negative(batch) if are_negative else None}
        encoded = pipeline.encode_prompt(batch, **{name: value for name, value in given.items() if name in known})
        tensors = teacher.prompt_tensors(encoded, are_negative)
        rows += [dict(zip(tensors, values, strict=True)) for values in zip(*tensors.values(), strict=True)]
    columns = {name: padded([row[name].cpu() for row in rows]) for name in rows[0]}
    kept = teacher.prompt_dtype
    return {name: each.to(kept) if kept and each.is_floating_point() else each for name, each in columns.items()}
