"""Which loader loads which layout, with and without the package, from a folder and from the Hub.

Every cell is tried; the table in docs/share.md is the one that is written here.
"""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import save_file

from hsivi_diffusers import HSIVIPipeline, HSIVIScheduler
from hub_server import Hub, run_clients
from short_run import contents
from tiny_unet import make_unet

DOCS = Path(__file__).parents[1] / "docs" / "share.md"
STATES = ["imported", "not imported", "not installed"]
PLACES = ["folder", "Hub"]
LOADERS = {
    "HSIVIPipeline": "HSIVIPipeline.from_pretrained(x)",
    "HSIVIPipeline, scheduler=": (
        'HSIVIPipeline.from_pretrained(x, scheduler=HSIVIScheduler.from_pretrained(x, subfolder="scheduler"))'
    ),
    "DiffusionPipeline": "DiffusionPipeline.from_pretrained(x)",
    "DiffusionPipeline, trust": "DiffusionPipeline.from_pretrained(x, trust_remote_code=True)",
    "DiffusionPipeline, custom": "DiffusionPipeline.from_pretrained(x, custom_pipeline=x, trust_remote_code=True)",
    "DDPMPipeline": "DDPMPipeline.from_pretrained(x)",
    "DDPMPipeline, trust": "DDPMPipeline.from_pretrained(x, trust_remote_code=True)",
    "DDPMPipeline, scheduler=": (
        'DDPMPipeline.from_pretrained(x, scheduler=HSIVIScheduler.from_pretrained(x, subfolder="scheduler"))'
    ),
}
NEED_IMPORT = [name for name, code in LOADERS.items() if "HSIVI" in code]
YES, TRUST, UNKNOWN, STOCK, NONE = "✓", "needs trust", "unknown", "stock", "·"
# layout and loader: what happens where the package is imported, not imported, not installed
EXPECTED = {
    ("ours", "HSIVIPipeline"): [YES, NONE, NONE],
    ("ours", "HSIVIPipeline, scheduler="): [YES, NONE, NONE],
    ("ours", "DiffusionPipeline"): [YES, UNKNOWN, UNKNOWN],
    ("ours", "DiffusionPipeline, trust"): [YES, UNKNOWN, UNKNOWN],
    ("ours", "DiffusionPipeline, custom"): [YES, YES, YES],
    ("ours", "DDPMPipeline"): [YES, TRUST, TRUST],
    ("ours", "DDPMPipeline, trust"): [YES, YES, YES],
    ("ours", "DDPMPipeline, scheduler="): [YES, NONE, NONE],
    ("stock pipeline", "HSIVIPipeline"): [YES, NONE, NONE],
    ("stock pipeline", "HSIVIPipeline, scheduler="): [YES, NONE, NONE],
    ("stock pipeline", "DiffusionPipeline"): [YES, TRUST, TRUST],
    ("stock pipeline", "DiffusionPipeline, trust"): [YES, YES, YES],
    ("stock pipeline", "DDPMPipeline"): [YES, TRUST, TRUST],
    ("stock pipeline", "DDPMPipeline, trust"): [YES, YES, YES],
    ("stock pipeline", "DDPMPipeline, scheduler="): [YES, NONE, NONE],
    ("stock classes", "HSIVIPipeline"): [STOCK, NONE, NONE],
    ("stock classes", "HSIVIPipeline, scheduler="): [YES, NONE, NONE],
    ("stock classes", "DiffusionPipeline"): [STOCK, STOCK, STOCK],
    ("stock classes", "DDPMPipeline"): [STOCK, STOCK, STOCK],
    ("stock classes", "DDPMPipeline, scheduler="): [YES, NONE, NONE],
}
CLIENT = """
import json, sys
if {state!r} == "not installed":
    sys.modules["hsivi_diffusers"] = None
elif {state!r} == "imported":
    from hsivi_diffusers import HSIVIPipeline, HSIVIScheduler
import torch
from diffusers import DDPMPipeline, DiffusionPipeline
from safetensors.torch import load_file

def outcome(load, x):
    try:
        pipeline = eval(load, globals(), {{"x": x}})
        assert type(pipeline.scheduler).__name__ == "HSIVIScheduler", "a stock scheduler"
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        pictures = pipeline(batch_size=2, generator=generator, num_inference_steps=3, output_type="np").images
        return "same" if torch.equal(torch.from_numpy(pictures), wanted) else "other pictures"
    except Exception as error:
        return f"{{type(error).__name__}}: {{error}}"

wanted = load_file({pictures!r})["pictures"]
for layout, loader, place, load, x in {cells!r}:
    print("CELL", json.dumps([layout, loader, {state!r}, place, outcome(load, x)]))
"""


def classify(outcome):
    """The mark of an outcome in the table."""
    signs = {
        "same": YES,
        "contains custom code": TRUST,
        "has no attribute HSIVIPipeline": UNKNOWN,
        "a stock scheduler": STOCK,
        "that carries the settings of a distilled sampler": STOCK,
    }
    return next((mark for sign, mark in signs.items() if sign in outcome), outcome)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of the three layouts, and the pictures that each must draw."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("layouts")
    unet = make_unet().eval()
    scheduler = HSIVIScheduler(layer_timesteps=[800, 400, 100, 0], noise_eta=1.0)
    ours = HSIVIPipeline(unet=unet, scheduler=scheduler)
    stock = DDPMPipeline(unet=unet, scheduler=scheduler)
    ours.save_pretrained(root / "ours")
    stock.save_pretrained(root / "stock pipeline")
    stock.scheduler = DDPMScheduler.from_config(scheduler.config)
    stock.save_pretrained(root / "stock classes")
    pictures = ours(batch_size=2, generator=torch.Generator().manual_seed(1), output_type="np").images
    save_file({"pictures": torch.from_numpy(pictures)}, root / "pictures.safetensors")
    return root


@pytest.fixture(scope="module")
def outcomes(saved, tmp_path_factory):
    """What each cell came to: {(layout, loader, state, place): mark}."""
    with Hub() as hub:
        sources = {}
        for layout in {layout for layout, _ in EXPECTED}:
            repo = "alice/" + layout.replace(" ", "-")
            hub.add_repo(repo, {path.as_posix(): data for path, data in contents(saved / layout).items()})
            sources[layout] = {"folder": str(saved / layout), "Hub": repo}
        codes, pictures = [], str(saved / "pictures.safetensors")
        for state in STATES:
            cells = [
                (layout, loader, place, LOADERS[loader], sources[layout][place])
                for layout, loader, of, place, _ in CASES
                if of == state
            ]
            codes.append(CLIENT.format(state=state, cells=cells, pictures=pictures))
        runs = run_clients(codes, hub, tmp_path_factory.mktemp("home"))
    assert [run.returncode for run in runs] == [0] * len(codes), runs
    found = [line[5:] for run in runs for line in run.stdout.splitlines() if line.startswith("CELL ")]
    return {tuple(cell): classify(outcome) for *cell, outcome in map(json.loads, found)}


CASES = [
    (layout, loader, state, place, mark)
    for (layout, loader), marks in EXPECTED.items()
    for state, mark in zip(STATES, marks, strict=True)
    for place in PLACES
    if state == "imported" or loader not in NEED_IMPORT
]


@pytest.mark.parametrize(("layout", "loader", "state", "place", "mark"), CASES)
def test_each_cell_of_the_matrix(outcomes, layout, loader, state, place, mark):
    got = outcomes[layout, loader, state, place]
    if mark != YES and diffusers.__version__ < "0.42":
        pytest.skip("older releases refuse in other words, or ask for less trust")
    assert got == mark


def test_the_matrix_stands_in_the_docs():
    lines = [
        "| layout | loader | " + " | ".join(STATES) + " |",
        "|---|---|" + ":---:|" * len(STATES),
        *(f"| {layout} | `{LOADERS[loader]}` | {' | '.join(marks)} |" for (layout, loader), marks in EXPECTED.items()),
    ]
    assert "\n".join(lines) in DOCS.read_text()
