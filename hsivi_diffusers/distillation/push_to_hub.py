"""Pushes the pipeline of a finished run to the Hub, with a model card made from the run's report.

    python -m hsivi_diffusers.distillation.push_to_hub --run_dir runs/digits_t5 \
        --hub_model_id user/digits-hsivi-5 --license apache-2.0

Run evaluate.py before, and the card says how good the sampler is. --pipeline pushes a pipeline without a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline

from ..hub import push
from ..options import option, parse_options


@dataclass
class Push:
    _argument_group_name = "push"
    hub_model_id: str | None = option(None, "repo to push to: user/name or organisation/name")
    run_dir: str | None = option(None, "folder of a run of train_hsivi.py; its pipeline is pushed")
    pipeline: str | None = option(None, "folder of a pipeline, in the place of that of a run")
    base_model: str | None = option(None, "repo id of the teacher, for the card; that of the run by default")
    license: str | None = option(None, "identifier of the licence, such as apache-2.0, for the card")
    fp16: bool = option(True, "push the weights in half precision too, as the variant fp16")
    hub_exist_ok: bool = option(False, "add to a repo that holds files; replaces its weights and README.md")
    hub_private_repo: bool = option(False, "make a new repo private")
    hub_revision: str | None = option(None, "branch to push to; made if need be")
    hub_token: str | None = option(None, "access token; that of `hf auth login` by default")


def main(args: list[str] | None = None) -> None:
    (options,) = parse_options([Push], __doc__ or "", args=args)
    if not options.hub_model_id:
        raise ValueError("--hub_model_id is missing: name the repo, such as user/digits-hsivi-5")
    if not (options.run_dir or options.pipeline):
        raise ValueError("--run_dir is missing: give the folder of a run of train_hsivi.py, or --pipeline FOLDER")
    folder = Path(options.pipeline or Path(options.run_dir) / "pipeline")
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} holds no pipeline: give the folder of a finished run, or a saved pipeline")
    url = push(
        DiffusionPipeline.from_pretrained(folder),
        options.hub_model_id,
        run_dir=options.run_dir,
        base_model=options.base_model,
        license=options.license,
        fp16=options.fp16,
        exist_ok=options.hub_exist_ok,
        private=options.hub_private_repo or None,
        revision=options.hub_revision,
        token=options.hub_token,
    )
    print(f"pushed to {url}")


if __name__ == "__main__":
    main()
