"""Checkpoints that survive a crash at any moment: complete or absent, and verified when they are loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from .folders import remove_folder, replace_folder, write_json, write_text
from .options import differences
from .output import ANEW, Complete, Output, find_damage, finished, is_partial, read_progress, seal, step_of
from .state_dicts import load_state_dict, random_state, save_state_dict, set_random_state


class State(Protocol):
    """The state of a training.

    Attributes:
        parts: Modules, optimizers and others with a `state_dict` that is the same in all processes, by file name.

    `save_state` writes what only this process has, and `load_state` restores it, on the CPU, after the parts.
    `check_finite` raises an error if a weight is not finite; `step` is the number of updates, for its message.
    """

    parts: dict[str, Any]

    @property
    def micro_batches(self) -> int: ...
    def check_finite(self, step: int) -> None: ...
    def save_state(self, folder: Path) -> None: ...
    def load_state(self, folder: Path) -> None: ...


class Checkpoints:
    """Folders OUTPUT_DIR/checkpoints/checkpoint-STEP; nothing else of that folder is touched.

    Each holds the parts of the state as safetensors, what the state saves, the generators of each process as JSON, and
    progress.json, written last: updates done, what they cost, number of micro-batches, the identity of the run, and the
    SHA-256 of every other file, which finds damage and is no signature. No pickle is written or read.

    All processes must see the same output folder.

    Args:
        run: Output folder, and the checkpoint to resume from.
        accelerator: Of the process.
        state: State of the training.
        identity: Options and hash of the teacher, which a resumed run must have in common with the earlier one.
        complete: See `start_run`.
    """

    def __init__(
        self,
        run: Output,
        accelerator: Accelerator,
        state: State,
        identity: Mapping[str, Any],
        complete: Complete = dict,
    ) -> None:
        self.output_dir = Path(str(run.output_dir))
        self.folder = self.output_dir / "checkpoints"
        self.run, self.accelerator, self.state, self.complete = run, accelerator, state, complete
        self.identity = json.loads(json.dumps(identity))  # as it is read from a checkpoint
        self.place = _place(self.output_dir)
        self.random = f"random-{accelerator.process_index}.json"

    def save(self, step: int, seconds: float, network_calls: int | None = None) -> None:
        """Saves the state after `step` updates, and what they cost, under its final name only when all is on the disk.

        Raises:
            ValueError: The output folder was moved or deleted since the run began, or not all processes see it.
            OSError: The disk is full.
        """
        self.state.check_finite(step)
        final, partial = self.folder / f"checkpoint-{step}", self.folder / f"partial-{step}"
        if self.accelerator.is_main_process:
            if _place(self.output_dir) != self.place:
                raise ValueError(
                    f"--output_dir {self.output_dir} was moved or deleted during the run, and nothing more is written: "
                    "name where it is now and continue with --resume_from_checkpoint latest, or start over"
                )
            partial.mkdir(parents=True, exist_ok=True)
            for name, part in self._parts().items():
                save_state_dict(part.state_dict(), partial / f"{name}.safetensors")
        self.accelerator.wait_for_everyone()
        self._check_shared(partial)
        self.state.save_state(partial)
        write_text(partial / self.random, json.dumps(random_state(self.accelerator.device)))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._finish(partial, final, {"step": step, "seconds": seconds, "network_calls": network_calls})
        self.accelerator.wait_for_everyone()

    def _finish(self, partial: Path, final: Path, progress: dict[str, Any]) -> None:
        """Seals a checkpoint, gives it its name, and removes those above the limit."""
        progress |= {"micro_batches": self.state.micro_batches, "identity": self.identity}
        write_json(partial / "progress.json", seal(partial, progress))
        replace_folder(partial, final)
        # A later one may be damaged.
        written = [path for path in finished(self.output_dir) if step_of(path) <= progress["step"]]
        for old in written[: -self.run.checkpoints_total_limit]:
            remove_folder(old)

    def _parts(self) -> dict[str, Any]:
        """The parts of the state, modules without what accelerate wrapped them in, and the loss scale of fp16."""
        parts = dict(self.state.parts)
        if self.accelerator.scaler is not None:
            parts["scaler"] = self.accelerator.scaler
        unwrap = self.accelerator.unwrap_model
        return {name: unwrap(part) if isinstance(part, nn.Module) else part for name, part in parts.items()}

    def load(self) -> tuple[int, float, int | None]:
        """Restores what --resume_from_checkpoint names; returns updates, their seconds, and network calls if known.

        `latest` is the newest checkpoint that is whole. Unfinished checkpoints of a killed run are removed.

        Raises:
            ValueError: The checkpoint is missing or damaged, or this run cannot continue from it, or not all processes
                see it.
        """
        if self.accelerator.is_main_process and self.folder.is_dir():
            for stale in filter(is_partial, self.folder.iterdir()):
                remove_folder(stale)
        self.accelerator.wait_for_everyone()
        choice = [self._choose() if self.accelerator.is_main_process else None]
        path, error = broadcast_object_list(choice)[0]
        if error is not None:
            raise ValueError(error)
        if path is None:
            return 0, 0.0, 0
        self._check_shared(path)
        progress = read_progress(path)
        self._check(path, progress)
        for name, part in self._parts().items():
            part.load_state_dict(load_state_dict(path / f"{name}.safetensors"))
        self.state.load_state(path)
        if (path / self.random).is_file():  # else it was saved by fewer processes
            set_random_state(json.loads((path / self.random).read_text(encoding="utf-8")), self.accelerator.device)
        return progress["step"], progress["seconds"], progress.get("network_calls")  # version 0.2 did not count them

    def _check(self, path: Path, progress: Mapping[str, Any]) -> None:
        """Refuses a checkpoint that this run cannot continue from."""
        if changed := differences(self.complete(progress["identity"]), self.identity):
            raise ValueError(
                f"{path} is of a run with another teacher or other options ({changed}): give those it had, or {ANEW}"
            )
        now = self.state.micro_batches
        if progress["micro_batches"] != now:
            raise ValueError(
                f"{path} is of a run with {progress['micro_batches']} micro-batches an update, now there are {now}: "
                "choose the processes and, where it is an option, --gradient_accumulation_steps so that their product "
                "is the same"
            )
        if self.accelerator.scaler is not None and not (path / "scaler.safetensors").is_file():
            raise ValueError(f"{path} was not trained in fp16 and has no loss scale: resume it with another precision")

    def _choose(self) -> tuple[Path | None, str | None]:
        """The checkpoint to resume from, if any, and an error, if any; all processes take what the main one chooses."""
        name = self.run.resume_from_checkpoint
        if name is None:
            return None, None
        if name != "latest":
            damage = find_damage(Path(name))
            return Path(name), damage and f"--resume_from_checkpoint {damage}: name one of {self.folder}, or latest"
        damages = []
        for path in reversed(finished(self.output_dir)):
            if (damage := find_damage(path)) is None:
                return path, None
            self.accelerator.print(f"passed over: {damage}")
            damages.append(damage)
        return None, f"no checkpoint of {self.folder} is whole ({'; '.join(damages)}): {ANEW}" if damages else None

    def _check_shared(self, path: Path) -> None:
        """Refuses a process that does not see a folder of the main process."""
        if not path.is_dir():
            raise ValueError(
                f"process {self.accelerator.process_index} does not see {path}, which the first process wrote: give an "
                "--output_dir that all machines of the run share"
            )


def _place(path: Path) -> tuple[int, int] | None:
    """Identifies a folder, also after it was moved; None if there is none."""
    return (path.stat().st_dev, path.stat().st_ino) if path.is_dir() else None
