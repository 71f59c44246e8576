"""Compares HSIVI with ADVI and NUTS on five posteriors, row by row.

    python -m training.benchmarks.inference.posteriors --output_dir runs/posteriors

writes OUTPUT_DIR/rows.json, rows.csv, and the table of posteriors.md, against a long run of NUTS of each posterior or
exact draws, which are kept in OUTPUT_DIR as well. A run that was stopped continues by the same command. `--quick true`
makes rows that mean nothing, in seconds.

The errors of a row are those of the quantities of a model (`posterior_models`):

    mean error    greatest |mean - reference| over the quantities, in standard deviations of the reference
    sd ratio      least and greatest ratio of a standard deviation to the reference's
    SWD           sliced Wasserstein distance, of the quantities in units of their deviations
    k-hat         Pareto k of the importance weights p / q, of HSIVI from an estimate of q
    CPU seconds   of the fit, its draws and k-hat

The floor is "exact", exact draws against others of them, or without these "nuts", one chain against the reference.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from safetensors.torch import load_file, save_file
from torch import Tensor

from hsivi_diffusers.commands.options import parse_options, run_command
from hsivi_diffusers.evaluation.pages import fill_page, write_table
from hsivi_diffusers.runs.folders import check_output_dir, sole_writer, write_json, write_text
from hsivi_diffusers.runs.options import option
from hsivi_diffusers.vi import DivergenceError

from .agreement import moments, sliced_wasserstein
from .posterior_methods import METHODS, QUICK, Fitted, Settings, run_chain
from .posterior_models import MODELS, Model
from .study_tables import mean_cell, sd_ratios_cell

Row = dict[str, Any]
EXACT = "exact"  # the floor of a model with exact draws: others of them
REFERENCE_SEED = 1000  # of the first chain
NAMES = {
    EXACT: "exact",
    "nuts": "NUTS",
    "mean_field": "ADVI, mean field",
    "full_rank": "ADVI, full rank",
    "hsivi": "HSIVI",
}
HEADS = ["mean error", "sd ratios", "SWD", "k-hat", "CPU seconds"]
COLUMNS = ["model", "method", "seed", "mean_error", "sd_ratio_min", "sd_ratio_max", "swd", "pareto_k", "seconds"]
COLUMNS += ["divergences", "failed"]


@dataclass
class Options:
    _group = "comparison"
    output_dir: str | None = option(None, "folder of rows, references and tables; an earlier run there continues")
    models: list[str] = option(list(MODELS), "names of the posteriors")
    seeds: list[int] = option([0, 1, 2], "of fits and chains; the settings were chosen on seed 9")
    quick: bool = option(False, "fits and chains that are far too short")


def make_rows(models: Sequence[str], seeds: Sequence[int], settings: Settings, folder: Path) -> list[Row]:
    """Does what rows.json lacks, and writes each row when it is done; returns all rows of the folder.

    Raises:
        ValueError: A model is unknown, or the rows of the folder were made with other settings.
    """
    if unknown := [name for name in models if name not in MODELS]:
        raise ValueError(f"no posterior is called {unknown[0]!r}: choose of {', '.join(MODELS)}")
    path = folder / "rows.json"
    results: dict[str, Any] = {"settings": asdict(settings), "rows": []}
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["settings"] != results["settings"]:
            raise ValueError(f"{path} was made with other settings: write to another --output_dir")
        results = before
    rows: list[Row] = results["rows"]
    done = {(row["model"], row["method"], row["seed"]) for row in rows}
    for name in models:
        model = MODELS[name]()
        for seed in seeds:
            for method in [*([EXACT] if model.exact else []), *METHODS]:
                if (name, method, seed) not in done:
                    reference = make_reference(name, model, settings, folder)
                    rows.append(make_row(name, model, method, seed, settings, reference))
                    write_json(path, results)
                    print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


def make_row(name: str, model: Model, method: str, seed: int, settings: Settings, reference: Tensor) -> Row:
    """Fits and measures; a fit that diverges is a row as well, without measures."""
    row: Row = {"model": name, "method": method, "seed": seed}
    begin = time.process_time()
    try:
        fitted = draw(model, method, seed, settings)
        seconds = time.process_time() - begin
        row |= measure(model.quantities(model.target.constrain(fitted.x)), reference)
    except (DivergenceError, ValueError) as error:
        return row | {"seconds": round(time.process_time() - begin, 2), "failed": str(error)}
    return row | fitted.notes | {"seconds": round(seconds, 2)}


def draw(model: Model, method: str, seed: int, settings: Settings) -> Fitted:
    """Draws in R^d by a method, or exact ones."""
    if method == EXACT and model.exact is not None:
        exact = model.exact(settings.draws, torch.Generator().manual_seed(seed))
        return Fitted(model.target.unconstrain(exact), {})
    return METHODS[method](model.target, seed, settings)


def measure(quantities: Tensor, reference: Tensor) -> dict[str, float]:
    """The errors of draws, shape (N, k), against those of a reference, shape (M, k)."""
    of, to = quantities.double(), reference.double()
    sd = to.std(0)
    errors = moments(of, to.mean(0), torch.cov(to.T))
    kept = {name: errors[name] for name in ("mean_error", "sd_ratio_min", "sd_ratio_max")}
    return kept | {"swd": sliced_wasserstein(of / sd, to / sd)}


def make_reference(name: str, model: Model, settings: Settings, folder: Path) -> Tensor:
    """Quantities of the reference, shape (M, k): from their file, or made and written to it.

    They are exact, or of several chains of NUTS, whose R-hat, effective sample size and divergences stand in a file of
    notes beside them.
    """
    path = folder / f"reference_{name}.safetensors"
    if not path.exists():
        chains, notes = run_reference(model, settings)
        write_json(path.with_suffix(".json"), notes)
        partial = path.with_name(f"{path.name}.partial")
        save_file({"quantities": chains.flatten(0, 1).contiguous()}, partial)
        partial.replace(path)
    return load_file(path)["quantities"]


def run_reference(model: Model, settings: Settings) -> tuple[Tensor, dict[str, Any]]:
    """The quantities of all chains, shape (chains, draws, k), and how far they can be trusted."""
    size, chains = settings.reference_draws, range(settings.reference_chains)
    if model.exact:
        exact = model.exact(len(chains) * size, torch.Generator().manual_seed(REFERENCE_SEED))
        return model.quantities(exact).reshape(len(chains), size, -1), {EXACT: True}
    begin = time.process_time()
    runs = [run_chain(model.target, REFERENCE_SEED + number, settings.warmup, size) for number in chains]
    walked = torch.stack([model.quantities(model.target.constrain(run.x)) for run in runs])
    notes = {
        "max_rhat": float(split_gelman_rubin(walked).max()),
        "min_ess": float(effective_sample_size(walked).min()),
        "divergences": sum(run.notes["divergences"] for run in runs),
        "seconds": round(time.process_time() - begin, 1),
    }
    return walked, notes


def write_pages(rows: Sequence[Row], folder: Path) -> None:
    """Writes rows.csv, and fills the table of posteriors.md, which is begun if there is none."""
    found = pd.DataFrame(rows, columns=COLUMNS)
    write_text(folder / "rows.csv", found.to_csv(index=False))
    fill_page(folder / "posteriors.md", "Posteriors", {"posteriors": table(found)})


def table(rows: pd.DataFrame) -> str:
    """A line for each posterior and method, exact draws first."""
    groups, lines = dict(list(rows.groupby(["model", "method"]))), []
    for name, method in product(rows["model"].unique(), NAMES):
        if (of := groups.get((name, method))) is not None:
            cells = [mean_cell(of, "mean_error"), sd_ratios_cell(of)]
            cells += [mean_cell(of, key, failures=False) for key in ("swd", "pareto_k", "seconds")]
            lines.append([name.replace("_", " "), NAMES[method], *cells])
    return write_table(["posterior", "method", *HEADS], ["posterior", "method"], lines)


def main(args: list[str] | None = None) -> None:
    (options,) = parse_options([Options], __doc__ or "", args=args)
    folder = check_output_dir(options.output_dir, keep=True)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    with sole_writer(folder):
        rows = make_rows(options.models, options.seeds, QUICK if options.quick else Settings(), folder)
        write_pages(rows, folder)
    print(f"{folder / 'posteriors.md'} is made")


if __name__ == "__main__":
    run_command(main)
