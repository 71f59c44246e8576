"""A study: many fits from YAML files, side by side in several processes, and the file of their results.

    {"rows": [{"study", "method", "target", "T", "objective", "bridge", "training", "seed", "parameters", "seconds",
     "js", ...}, ...], "made": [{"date", "torch", "python"}, ...]}

Every row that is done is in the file at once, so a study that was stopped continues by the same command.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields, replace
from datetime import date
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml

from hsivi_diffusers.runs.bars import bar
from hsivi_diffusers.runs.folders import write_json
from hsivi_diffusers.vi import DivergenceError, SampledTarget

from .benchmark_targets import load_reference, make_target
from .target_fit import DRAWS, JS_DRAWS, Fit, measure, prepare, run
from .targets.whitened import FullNormal, laplace, moment_match

Row = dict[str, Any]
AXES = {f"{name}s": name for name in ("target", "objective", "bridge", "seed", "depth")}
AXES |= {name: name for name in ("num_layers", "training", "whitening", "parameters")}
_FIT_KEYS = [field.name for field in fields(Fit) if field.name not in ("num_layers", "parameters")]
KEYS = ["study", "method", "T", "parameters_wanted", *_FIT_KEYS]
NULLS = ("exact", "untrained", "laplace", "gaussian")
Job = tuple[str, str, Fit]


def read_study(path: str | Path, quick: bool = False) -> list[Job]:
    """Reads a YAML file into study, method and settings of each row.

    It has `study` (a name), `axes` (lists, of which all combinations are fitted), `fit` (settings of `Fit`),
    `by_objective` and `by_target` (more of them), `quick` (axes and settings that replace those in a quick run), and
    `nulls` (false for none). Rows with one layer come once, for neither bridge nor training matters there.
    """
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    _refuse_unknown(path, content, {"study", "axes", "fit", "by_objective", "by_target", "quick", "nulls"})
    axes, common = dict(content["axes"]), dict(content.get("fit", {}))
    if quick:
        for name, value in content.get("quick", {}).items():
            (axes if name in AXES else common)[name] = value
    _refuse_unknown(path, axes, set(AXES))
    jobs: dict[Job, None] = {}
    for values in product(*axes.values()):
        settings = common | dict(zip((AXES[name] for name in axes), values, strict=True))
        more = content.get("by_objective", {}).get(settings.get("objective"), {})
        more = more | content.get("by_target", {}).get(settings.get("target"), {})
        if quick:
            more = {name: value for name, value in more.items() if name not in content.get("quick", {})}
        _refuse_unknown(path, settings | more, {field.name for field in fields(Fit)})
        fit = Fit(**(settings | more))
        first = axes.get("bridges", [fit.bridge])[0], axes.get("training", [fit.training])[0]
        if fit.num_layers == 1 and (fit.bridge, fit.training) != first:
            continue
        jobs[(content["study"], "SIVI" if fit.num_layers == 1 else "HSIVI", fit)] = None
    nulls = [
        (content["study"], method, Fit(target=target, num_steps=1, seed=seed))
        for target in axes["targets"]
        for method in (NULLS if content.get("nulls", True) else ())
        for seed in axes["seeds"]
        if method != "laplace" or not isinstance(make_target(target), SampledTarget)
    ]
    return [*nulls, *jobs]


def run_study(jobs: Sequence[Job], path: Path, workers: int) -> None:
    """Fits what the file of results does not hold yet; each row is written when it is done."""
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
    wanted = {_key(_describe(job)): job for job in jobs}
    done = {_key(row) for row in results["rows"]}
    _refuse_stale(path, results["rows"], wanted)
    for target in {job[2].target for job in jobs}:
        if not isinstance(make_target(target), SampledTarget):
            load_reference(target)  # now, not after an hour
    left = [job for key, job in wanted.items() if key not in done]
    here = {"date": date.today().isoformat(), "torch": torch.__version__, "python": platform.python_version()}
    results["made"] = [*(session for session in results.get("made", []) if session != here), here]
    # spawn, not fork: torch's threads do not survive a fork.
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = [pool.submit(run_job, job) for job in left]
        try:
            for future in bar(as_completed(futures), total=len(futures), unit="fit"):
                results["rows"].append(future.result())
                write_json(path, results)
        except BaseException:  # else it would wait for all others first, and lose them
            pool.shutdown(cancel_futures=True)
            raise
    results["rows"].sort(key=lambda row: [str(value) for value in _key(row)])
    write_json(path, results)


def run_job(job: Job) -> Row:
    """Does one row. A fit that diverges is a row too, without measures."""
    study, method, fit = job
    row = _describe(job)
    if method in NULLS:
        return row | _measure_null(method, fit)
    begin = time.process_time()
    try:
        fitted, seconds = run(fit)
        row |= measure(fitted.sample, fit.target)
        row["findings"] = sorted({finding.signature for finding in fitted.inference.diagnose(seed=2)})
    except (DivergenceError, ValueError) as error:
        return row | {"seconds": round(time.process_time() - begin, 2), "failed": str(error)}
    parameters = sum(parameter.numel() for parameter in fitted.inference.layers.parameters())
    return row | {"parameters": parameters, "seconds": round(seconds, 2)}


def _describe(job: Job) -> Row:
    study, method, fit = job
    row = {"study": study, "method": method, **asdict(fit)}
    row |= {"T": row.pop("num_layers"), "parameters_wanted": row.pop("parameters")}
    if method in NULLS:
        row |= dict.fromkeys(("T", "objective", "bridge", "training", "whitening"))
    return row


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in KEYS)


def _refuse_stale(path: Path, rows: Sequence[Row], wanted: Collection[tuple[Any, ...]]) -> None:
    """Rows of the same studies with other settings would be averaged with the new ones."""
    studies = {key[0] for key in wanted}
    stale = sum(row["study"] in studies and _key(row) not in wanted for row in rows)
    if stale:
        raise ValueError(
            f"{path} holds {stale} rows of {', '.join(sorted(studies))} with settings that are no longer asked for: "
            "move the file away, or write to another --output_dir"
        )


def _measure_null(method: str, fit: Fit) -> dict[str, float]:
    """Rows to hold the others against; "exact" is the floor: exact draws, or the half of a reference against it all."""
    target = make_target(fit.target)
    if method == "untrained":
        return measure(prepare(replace(fit, bridge="geometric", num_layers=1)).sample, fit.target)
    if method == "laplace":
        return measure(lambda size, seed: laplace(target).sample(size, _seeded(seed)).float(), fit.target)
    if isinstance(target, SampledTarget):
        exact = target.sample(JS_DRAWS, _seeded(1000 + fit.seed))
    else:
        exact = _reference_half(fit.target, fit.seed)
    if method == "gaussian":
        matched = moment_match(exact)
        return measure(lambda size, seed: matched.sample(size, _seeded(seed + fit.seed)).float(), fit.target)
    measures = measure(lambda size, seed: exact[:size], fit.target)
    if isinstance(target, SampledTarget):
        return measures
    # The half is made of the reference's own draws, so distances between draws would say nothing.
    return {name: value for name, value in measures.items() if name not in ("swd", "mmd", "ksd")}


def _reference_half(name: str, seed: int) -> torch.Tensor:
    """The stored draws of the reference, moved so that they have the moments of one half of its chains."""
    reference = load_reference(name)
    mean, covariance = (
        (reference.mean_1, reference.covariance_1) if seed % 2 else (reference.mean_2, reference.covariance_2)
    )
    half = FullNormal(mean.double(), torch.linalg.cholesky(covariance.double()))
    return half.unwhiten(moment_match(reference.draws).whiten(reference.draws.double())).float()[:DRAWS]


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _refuse_unknown(path: str | Path, given: Mapping[str, Any], known: set[str]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{path}: unknown key {name!r}; known are {', '.join(sorted(known))}")
