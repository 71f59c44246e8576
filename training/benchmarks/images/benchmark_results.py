"""The results of a benchmark: rows in results.json, and beside the trainings images for figures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hsivi_diffusers.distillation.config import HSIVIConfig, complete
from hsivi_diffusers.runs.folders import in_turn, write_text
from hsivi_diffusers.runs.options import differences

Row = dict[str, Any]
Key = tuple[str, int, int | None]  # method, NFE and training seed
RESULTS = "results.json"

OURS = "HSIVI"
REAL, TEACHER, TEACHER_SDE, SOLVER = "real images", "teacher", "teacher, SDE", "tuned solver"
UNGUIDED = "unguided solver"  # tuned too; beside teachers under guidance
POLISHED = "polished solver"  # tuned further, see `PolishedSolver`
PAIRS, PROGRESSIVE, CONSISTENCY = "pairs only", "progressive distillation", "consistency distillation"
LATENT_CONSISTENCY = "LCM-LoRA"
BASELINES = (PAIRS, PROGRESSIVE, CONSISTENCY, LATENT_CONSISTENCY)
NO_LORA, NO_NOISE = f"{OURS}, no LoRA", f"{OURS}, eta 0"
ALL_STEPS, ALL_SCALES = f"{OURS}, one for all", f"{OURS}, one for all scales"
PROMPTS = "prompts"  # in the metadata of the images of figures
RECIPE = ("preset", "num_inference_steps", "max_train_steps")


def read_rows(path: Path) -> list[Row]:
    """Rows of a results.json; an empty list if there is no such file."""
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return rows


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes a results.json, a row a line."""
    lines = ",\n".join(map(json.dumps, rows))
    write_text(path, f'{{"rows": [\n{lines}\n]}}\n')


def hash_networks(*folders: Path) -> str:
    """The first digits of the SHA-256 of all weights in folders: of teacher and classifier of a row."""
    found = hashlib.sha256()
    for path in (each for folder in folders for each in sorted(folder.rglob("*.safetensors"))):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def read_pictures(runs: Path, dataset: str) -> dict[str, torch.Tensor]:
    """The first images of each row of a set that was measured here, as bytes, by `METHOD at NFE`."""
    path = pictures_path(runs, dataset)
    return load_file(path) if path.exists() else {}


def read_prompts(runs: Path, dataset: str) -> list[str] | None:
    """The prompts of these images, None if they have none."""
    with safe_open(pictures_path(runs, dataset), "pt") as file:
        prompts: list[str] | None = json.loads((file.metadata() or {}).get(PROMPTS, "null"))
    return prompts


def pictures_path(runs: Path, dataset: str) -> Path:
    return runs / dataset / "pictures.safetensors"


class Results:
    """Rows and images of one set, in files that several sets share.

    Args:
        folder: Of the file of the rows.
        runs: Of the trainings, and of the images that figures show.
        dataset: Name of the set.
        name: Of the file.
    """

    def __init__(self, folder: Path, runs: Path, dataset: str, name: str = RESULTS) -> None:
        self.path, self.images_path, self.dataset = folder / name, pictures_path(runs, dataset), dataset

    def rows(self) -> list[Row]:
        """The rows of this set."""
        return [row for row in read_rows(self.path) if row["dataset"] == self.dataset]

    def keys(
        self, students: Mapping[Key, HSIVIConfig | None], told: Mapping[Key, Mapping[str, Any]], drawn: Row
    ) -> set[tuple[Key, int]]:
        """Keys of the rows and their noise seeds; one of other images or settings is refused."""
        rows = self.rows()
        for row in rows:
            name = f"{self.path} has {row['method']} at {row['nfe']}"
            if other := differences(row, drawn):
                raise ValueError(f"{name} of other images or networks ({other}): name another --output_dir")
            if other := differences(row, told.get(key_of(row), {})):
                raise ValueError(
                    f"{name} of other settings than --solvers or its config has now ({other}): remove that row, or "
                    "name another --output_dir"
                )
            if (config := students.get(key_of(row))) is None:
                continue
            if other := differences(recorded({**row["recipe"], "seed": config.seed}, config), settings_of_row(config)):
                raise ValueError(
                    f"{name}, seed {row['train_seed']}, of other options than --students have now ({other}): remove "
                    "that row, or name another --output_dir"
                )
        return {(key_of(row), row["eval_seed"]) for row in rows}

    def cost_of(self, method: str, counts: Sequence[int], seed: int) -> tuple[float, int]:
        """The most seconds and the most network calls of the trainings of a method to these NFE.

        Raises:
            ValueError: The network calls are not known.
        """
        keys = [(method, nfe, seed) for nfe in counts]
        rows = [row for row in self.rows() if key_of(row) in keys]
        if unknown := [row["nfe"] for row in rows if row["train_calls"] is None]:
            raise ValueError(
                f"the network calls of {method} at {unknown}, seed {seed}, are not known, for the run was killed at "
                "its end: remove it and its rows"
            )
        return max(row["train_seconds"] for row in rows), max(row["train_calls"] for row in rows)

    def add(self, row: Row) -> None:
        """Adds a row, or replaces the same row if another process has measured it in the meantime."""
        own = self.dataset, key_of(row), row["eval_seed"]
        with in_turn(self.path.parent):  # another set may be measured at the same time
            rows = read_rows(self.path)
            others = [each for each in rows if (each["dataset"], key_of(each), each["eval_seed"]) != own]
            write_rows(self.path, [*others, row])

    def keep_images(
        self, name: str, images: torch.Tensor, real: torch.Tensor, prompts: Sequence[str] | None = None
    ) -> None:
        """Keeps images of a row under its name, and as many real ones, all in [0, 1], (N, C, H, W), as bytes."""
        shown = real[torch.linspace(0, len(real) - 1, len(images)).long()]
        drawn, shown = ((255 * each).round().to(torch.uint8).contiguous() for each in (images, shown))
        before = load_file(self.images_path) if self.images_path.exists() else {}
        told = None if prompts is None else {PROMPTS: json.dumps([*prompts])}
        save_file({**before, name: drawn, "real": shown}, self.images_path, told)


def recipe_of(config: HSIVIConfig) -> dict[str, Any]:
    """Preset, steps and updates of a student, and its settings that are not those of the preset."""
    settings = settings_of_row(config)
    given = {name: settings[name] for name in RECIPE}
    usual = HSIVIConfig(**given).settings()
    return {**given, **{name: value for name, value in settings.items() if value != usual[name] and name != "seed"}}


def settings_of_row(config: HSIVIConfig) -> dict[str, Any]:
    """The settings of a student, of its start the name alone: rows may be measured with another folder of trainings."""
    settings = config.settings()
    return {**settings, "init_from": settings["init_from"] and Path(settings["init_from"]).name}


def recorded(settings: Mapping[str, Any], config: HSIVIConfig) -> dict[str, Any]:
    """Recorded settings as a run of today writes them, to be compared with a config.

    At guidance_scale 1 version 0.2 did not train the last class, "no class", which class_shares of `config` say now.
    """
    completed = complete(settings)
    if completed["guidance_scale"] == 1 and completed["class_shares"] is None:
        completed["class_shares"] = config.class_shares
    return completed


def key_of(row: Row) -> Key:
    """What a row is of."""
    return row["method"], row["nfe"], row["train_seed"]
