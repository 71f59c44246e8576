"""Checkpoints that survive a crash at any moment: complete under their name or absent, and verified on loading."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from folders import remove_folder, replace_folder, write_json
from hsivi_diffusers.vi import DivergenceError
from players import Players
from recipe import Run


class Checkpoints:
    """Folders OUTPUT_DIR/checkpoints/checkpoint-STEP.

    Each holds what accelerate saves, the chains of every shard, and progress.json, written last: updates done, seconds
    spent, number of shards, and the SHA-256 of every other file.
    """

    def __init__(self, output_dir: Path, run: Run, accelerator: Accelerator, players: Players) -> None:
        self.folder = output_dir / "checkpoints"
        self.run, self.accelerator, self.players = run, accelerator, players

    def save(self, step: int, seconds: float) -> None:
        """Saves the state after `step` updates, under its final name only when it is all on the disk.

        Raises:
            DivergenceError: A weight is not finite; nothing is written.
        """
        players = self.players
        weights = {"the layers": players.layers.parameters(), "the critic": players.critic.parameters()}
        for name, parameters in {**weights, "the average": players.ema.shadow_params}.items():
            if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
                raise DivergenceError(f"a weight of {name}", step - 1, range(players.student.num_layers))
        final, partial = self.folder / f"checkpoint-{step}", self.folder / f"partial-{step}"
        self.accelerator.save_state(str(partial))
        for shard, chain in self._own_chains(partial):
            save_file(self.players.chains[chain].state_dict(), shard)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_json(partial / "progress.json", _progress(partial, step, seconds, self.players.shards))
            replace_folder(partial, final)
            written = [path for path in self.finished() if _step(path) <= step]  # a later one may be damaged
            for old in written[: -self.run.checkpoints_total_limit]:
                remove_folder(old)
        self.accelerator.wait_for_everyone()

    def finished(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        found = [path.parent for path in self.folder.glob("checkpoint-*/progress.json") if not path.parent.suffix]
        return sorted(found, key=_step)

    def load(self) -> tuple[int, float]:
        """Restores what --resume_from_checkpoint names; returns updates done and seconds spent.

        `latest` takes the newest checkpoint that is whole. What a run that was killed left half written goes.

        Raises:
            ValueError: The checkpoint that was named is missing or damaged, all are damaged, or it is of another number
                of shards.
        """
        if self.accelerator.is_main_process:
            for stale in [*self.folder.glob("partial-*"), *self.folder.glob("*.retired")]:
                remove_folder(stale)
        self.accelerator.wait_for_everyone()
        path = self._choose()
        if path is None:
            return 0, 0.0
        progress = json.loads((path / "progress.json").read_text())
        shards = self.players.shards
        if progress["shards"] != shards:
            raise ValueError(
                f"{path} is of a run with {progress['shards']} batches an update, now there are {shards}: choose "
                "--gradient_accumulation_steps so that times the number of processes it is as many"
            )
        if self.accelerator.scaler is not None and not (path / "scaler.pt").is_file():
            raise ValueError(f"{path} was not trained in fp16 and has no loss scale: resume it with another precision")
        self.accelerator.load_state(str(path))
        self.players.ema.to(self.accelerator.device)  # accelerate loads it to the CPU
        for shard, chain in self._own_chains(path):
            self.players.chains[chain].load_state_dict(load_file(shard))
        return progress["step"], progress["seconds"]

    def _choose(self) -> Path | None:
        name = self.run.resume_from_checkpoint
        if name is None:
            return None
        if name != "latest":
            if damage := find_damage(Path(name)):
                raise ValueError(f"--resume_from_checkpoint {damage}: name one of {self.folder}, or latest")
            return Path(name)
        damages = []
        for path in reversed(self.finished()):
            damage = find_damage(path)
            if damage is None:
                return path
            self.accelerator.print(f"passed over: {damage}")
            damages.append(damage)
        if damages:
            raise ValueError(
                f"no checkpoint of {self.folder} is whole ({'; '.join(damages)}): start anew with "
                "--overwrite_output_dir and without --resume_from_checkpoint"
            )
        return None

    def _own_chains(self, folder: Path) -> list[tuple[Path, int]]:
        """Files of the shards of this process, and the chains they are of."""
        first = self.players.first_shard
        return [(folder / f"chains-{first + i}.safetensors", i) for i in range(len(self.players.chains))]


def find_damage(path: Path) -> str | None:
    """Says what is wrong with a checkpoint, or None if every byte is as it was written."""
    if not (path / "progress.json").is_file():
        return f"{path} holds no checkpoint"
    try:
        progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))
        seal = progress.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError):
        return f"{path}/progress.json is damaged"
    if seal != _digest(json.dumps(progress, sort_keys=True).encode()):
        return f"{path}/progress.json is damaged"
    for name, digest in progress["files"].items():
        if not (path / name).is_file():
            return f"{path} lacks {name}"
        if _file_digest(path / name) != digest:
            return f"{path / name} is damaged"
    return None


def _step(path: Path) -> int:
    return int(path.name.split("-")[1])


def _progress(folder: Path, step: int, seconds: float, shards: int) -> dict[str, Any]:
    files = {
        path.relative_to(folder).as_posix(): _file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "progress.json"
    }
    progress = {"step": step, "seconds": seconds, "shards": shards, "files": files}
    return {**progress, "sha256": _digest(json.dumps(progress, sort_keys=True).encode())}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
