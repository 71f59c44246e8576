"""Pushing and pulling over HTTP, with the client as it is and a Hub on the loopback."""

import contextlib
import io
import itertools
import json
import re
import shutil
from functools import partial
from unittest import mock

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, PNDMPipeline, PNDMScheduler
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load, load_file, save_file

from hsivi_diffusers import HSIVIPipeline, HSIVIScheduler, push
from hsivi_diffusers.runs.artifacts import ADAPTER
from hsivi_diffusers.share import card as cards
from hsivi_diffusers.share import push as hub
from hsivi_diffusers.share.card import make_card
from hsivi_diffusers.share.push import CUT, read_run
from hub_server import Hub, run_clients, signed_in
from make_golden import draw, make_pipeline
from short_run import contents
from tiny_unet import make_unet

WEIGHTS = "diffusion_pytorch_model.safetensors"
ROWS = [
    {"dataset": "digits", "method": method, "nfe": nfe, "num_samples": 500, "fd": fd, "swd": 0.02}
    for method, nfe, fd in (("HSIVI", 4, 1.25), ("DDIM", 4, 9.5), ("DDPM", 100, 0.75))
]


@pytest.fixture(scope="module", autouse=True)
def small_grids():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hub, "draw_grid", partial(hub.draw_grid, rows=1, columns=2))
        yield


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A finished run: pipeline, options, cost, report and figures."""
    folder = tmp_path_factory.mktemp("run")
    pipeline = make_pipeline()
    pipeline.save_pretrained(folder / "pipeline")
    save_file({"pictures": draw(pipeline)}, folder / "pictures.safetensors")
    report = {"features": "digits classifier features", "measured": "Measured on a test.", "rows": ROWS}
    options = {"preset": "fast", "seed": 3, "pretrained_teacher_model": "google/ddpm-cifar10-32"}
    training = {"seconds": 12.3, "processes": 1, "base_model": "google/ddpm-cifar10-32"}
    for name, content in (("report", report), ("options", options), ("training", training)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    beside = PngInfo()
    beside.add_text("Source", "/home/alice/figure.py")
    for name, colour in (("samples", "red"), ("curve", "blue")):
        Image.new("RGBA", (3, 2), colour).save(folder / f"{name}.png", pnginfo=beside)
    return folder


def pixel(png):
    with Image.open(io.BytesIO(png)) as image:
        return image.size, image.getpixel((0, 0))


# For a process of its own: the pictures of tests/make_golden.py, and whether a pipeline draws them.
SAME = """
import torch
from safetensors.torch import load_file
wanted = load_file({pictures!r})["pictures"]
def same(pipeline):
    pictures = pipeline(batch_size=4, generator=torch.Generator().manual_seed(0), output_type="np").images
    return torch.equal(torch.from_numpy(pictures), wanted)
"""
WITHOUT_PACKAGE = "import sys\nsys.modules['hsivi_diffusers'] = None\n"


@pytest.fixture
def same(run_dir):
    """Tells whether a pipeline draws the pictures of that of the run."""
    wanted = load_file(run_dir / "pictures.safetensors")["pictures"]
    return lambda pipeline: torch.equal(draw(pipeline), wanted)


@pytest.fixture
def pipeline(run_dir):
    return HSIVIPipeline.from_pretrained(run_dir / "pipeline")


@pytest.fixture(scope="module")
def pushed(run_dir, tmp_path_factory):
    """A hub with alice/digits, pushed with its run, and what push returned."""
    with Hub() as server:
        server.add_repo("google/ddpm-cifar10-32", author="bob")
        before = contents(run_dir)
        with signed_in(server, tmp_path_factory.mktemp("home")):
            server.answer = push(run_dir / "pipeline", "alice/digits", run_dir=run_dir, license="apache-2.0")
        assert before == contents(run_dir)
        yield server


@pytest.fixture
def client(pushed, tmp_path):
    """The client of this process talks to that hub, as alice and with an empty cache."""
    with signed_in(pushed, tmp_path / "home"):
        yield pushed


def files_of(hub, name):
    return hub.repos[name].branches["main"].files


def test_one_commit_holds_weights_code_and_card_and_no_pickle(pushed):
    head = pushed.repos["alice/digits"].branches["main"]
    assert pushed.answer == f"{pushed.url}/alice/digits/commit/{head.sha}"
    assert head.title == "Upload a sampler of 4 network calls"
    unet, noise_scale = (
        {f"{name}/{file}" for file in ("config.json", WEIGHTS, WEIGHTS.replace(".safe", ".fp16.safe"))}
        for name in ("unet", "unet_noise_scale")
    )
    code = {"pipeline.py", "scheduler/hsivi_diffusers.py", "unet_noise_scale/hsivi_diffusers.py"}
    figures = {"comparison.png", "curve.png", "samples.png"}
    others = {".gitattributes", "README.md", "model_index.json", "scheduler/scheduler_config.json"}
    assert set(head.files) == unet | noise_scale | code | figures | others
    assert pixel(head.files["comparison.png"]) == ((3, 2), (255, 0, 0))
    assert pixel(head.files["curve.png"]) == ((3, 2), (0, 0, 255))
    assert head.files["samples.png"].startswith(b"\x89PNG")
    for private in (b"/tmp", b"alice/figure", b'"_name_or_path"'):
        assert not [name for name, data in head.files.items() if private in data]


def test_the_card_has_the_metadata_of_the_run(pushed):
    card = ModelCard(files_of(pushed, "alice/digits")["README.md"].decode())
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert card.data.base_model == "google/ddpm-cifar10-32"
    assert card.data.license == "apache-2.0"
    assert {"hsivi", "arxiv:2310.17153"} <= set(card.data.tags)
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert metrics == {"frechet_distance": 1.25, "sliced_wasserstein_distance": 0.02}
    assert "| 4 | **HSIVI, this model** | 1.25 | 0.0200 | 500 |" in card.text
    assert "preset fast, seed 3. It took 12 s in 1 process." in card.text


def test_half_precision_lies_beside_weights_and_configs_that_stay(pushed, run_dir):
    files, saved = files_of(pushed, "alice/digits"), run_dir / "pipeline"
    for part in ("unet", "unet_noise_scale"):
        whole, half = (load(files[f"{part}/diffusion_pytorch_model{kind}.safetensors"]) for kind in ("", ".fp16"))
        assert {tensor.dtype for tensor in half.values()} == {torch.float16}
        assert half.keys() == whole.keys()
        assert all(torch.equal(half[name], whole[name].half()) for name in whole)
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        assert json.loads(files[name]) == json.loads((saved / name).read_text())


@pytest.mark.parametrize("size", [{"sample_size": None}, {"in_channels": 5, "out_channels": 5}])
def test_what_cannot_be_drawn_has_no_grid(logged_in, size):
    push(HSIVIPipeline(make_unet(**size), HSIVIScheduler(layer_timesteps=[500, 0])), "alice/undrawn")
    files = files_of(logged_in, "alice/undrawn")
    assert "samples.png" not in files
    assert "samples.png" not in files["README.md"].decode()
    assert f"unet/{WEIGHTS}" in files


def test_only_old_weights_are_removed(client, pipeline, same):
    kept = {"notes.txt": b"mine", "unet/notes.txt": b"mine", "other/model.safetensors": b"mine"}
    shards = [f"unet/diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    stale = [*shards, *(f"unet/diffusion_pytorch_model{end}" for end in (".safetensors.index.json", ".bin"))]
    stale.append("unet/diffusion_pytorch_model.fp16.safetensors")
    client.add_repo("alice/old", {"README.md": b"old", **kept, **dict.fromkeys(stale, b"old")})
    push(pipeline, "alice/old", exist_ok=True, fp16=False)
    assert same(HSIVIPipeline.from_pretrained("alice/old"))
    files = files_of(client, "alice/old")
    assert kept.items() <= files.items()
    assert not {*stale} & {*files}
    assert files["README.md"].startswith(b"---\nlibrary_name: diffusers")


@pytest.mark.parametrize("kind", ["adapter", "pipeline"])
def test_weights_that_a_push_does_not_replace_stay(client, pipeline, tmp_path, kind):
    kept = [f"vae/{WEIGHTS}", "text_encoder/model.safetensors", "unet/my_lora.safetensors"]
    if kind == "adapter":
        kept.append(f"unet/{WEIGHTS}")
        save_file({"lora": torch.zeros(1)}, tmp_path / ADAPTER)
        pipeline.scheduler.save_pretrained(tmp_path / "scheduler")
        pipeline = tmp_path
    client.add_repo("alice/mixed", dict.fromkeys(kept, b"mine"))
    push(pipeline, "alice/mixed", exist_ok=True, fp16=False)
    files = files_of(client, "alice/mixed")
    assert {name: files.get(name) for name in kept} == dict.fromkeys(kept, b"mine")


def card_of(report, training=None):
    run = {"options": {}, "training": training or {}, "report": report}
    return ModelCard(str(make_card(make_pipeline(), "alice/digits", run)))


@pytest.mark.parametrize(
    ("changed", "metrics", "cells"),
    [
        ({"fd": float("nan")}, ["sliced_wasserstein_distance"], "- | 0.0200"),
        ({"fd": float("inf"), "swd": None}, [], "- | -"),
        ({"swd": None}, ["frechet_distance"], "1.25 | -"),
        ({"dataset": None}, [], "1.25 | 0.0200"),
    ],
)
def test_what_was_not_measured_is_a_dash_and_no_metric(changed, metrics, cells):
    card = card_of({"rows": [*ROWS[1:], {**ROWS[0], **changed}]})
    assert [result.metric_type for result in card.data.eval_results or []] == metrics
    assert f"| 4 | **HSIVI, this model** | {cells} | 500 |" in card.text


@pytest.mark.parametrize("address", [None, "https://address.invalid/here", "https://example.org/here"])
def test_a_card_says_how_to_install_the_package_if_its_repository_has_an_address(monkeypatch, address):
    monkeypatch.setattr(cards, "metadata", lambda name: {"Home-page": address})
    by = ' by `pip install "hsivi-diffusers @ git+https://example.org/here"`' if "example.org" in str(address) else ""
    assert f"With the package `hsivi_diffusers` installed{by} (without it, use the code" in card_of({}).text


def test_a_card_names_the_published_weights_that_a_student_started_from():
    assert "started from" not in card_of({}).text
    source = "ORG/Hyper-SD/Hyper-SD15-4steps-lora.safetensors"
    assert f"The student started from {source}, which may have" in card_of({}, {"start": source}).text


COST = {"seconds": 12.3, "processes": 1, "peak_memory_mib": 6759}
EVIL = "fast\n# Heading <script>alert(1)</script> [link](https://evil.example) `code` ![](x) *b* _i_ | c"


@pytest.mark.parametrize(("cutoff", "takes_stock"), [(None, True), (2.0, False)])
def test_a_card_has_code_for_a_stock_pipeline_if_that_draws_the_noise_of_the_student(cutoff, takes_stock):
    scheduler = HSIVIScheduler(layer_timesteps=[440, 0], noise_cutoff=cutoff)
    card = make_card(HSIVIPipeline(make_unet(), scheduler), "alice/one", {"options": {}, "training": {}, "report": {}})
    assert ("import DDPMPipeline" in card.text) == takes_stock
    assert ("A stock DDPMPipeline cannot draw with it, because it draws noise of all" in card.text) != takes_stock


def test_nothing_of_the_files_of_a_run_becomes_markdown():
    rows = [{**ROWS[0], "nfe": EVIL, "num_samples": EVIL}, {**ROWS[1], "nfe": EVIL, "method": EVIL}]
    run = {"options": {"preset": EVIL, "seed": EVIL}, "training": {"base_model": EVIL, "start": EVIL}}
    run["report"] = {"rows": rows, "features": EVIL, "measured": EVIL}
    plain = make_card(make_pipeline(), "alice/digits", {**run, "options": {}, "report": {}}).text
    text = make_card(make_pipeline(), "alice/digits", run).text
    assert text.count("&lt;script&gt;") == 9
    for mark in ("<script>", "[link](", "![](x)", "*b*", " _i_", " | c", " `code`"):
        assert mark not in text
    headings, wanted = ([line for line in each.splitlines() if line.startswith("#")] for each in (text, plain))
    assert headings == wanted


def test_the_headline_of_the_report_comes_first_with_its_floor():
    more = {"kid": 0.0015, "recall": 0.91, "coverage": 0.88}
    report = {"headline": "kid", "features": "EfficientNet", "reference": "teacher | 50"}
    report["floor"] = {"kid": -0.0002, "fd": 0.5, "recall": 0.99, "coverage": 0.98, "swd": 0.01}
    card = card_of({**report, "rows": [{**ROWS[0], **more}]})
    head, _, floor, line = [line for line in card.text.splitlines() if line.startswith("|")]
    heads = ["KID x 1000, EfficientNet", "FD, EfficientNet", "recall", "coverage", "SWD"]
    assert head == f"| NFE | method | {' | '.join(heads)} | images |"
    assert line == "| 4 | **HSIVI, this model** | 1.50 | 1.25 | 0.910 | 0.880 | 0.0200 | 500 |"
    assert floor == "|  | two halves of the reference | -0.20 | 0.50 | 0.990 | 0.980 | 0.0100 |  |"
    assert "compared to teacher \\| 50. A KID below 0 is measurement noise" in card.text
    text = card_of({**report, "rows": [{**ROWS[0], "pixel_fd": 0.03}]}).text
    assert "FD of pixels: of up to 64 of their principal components." in text
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values == {"frechet_distance": 1.25, "kid_x_1000": 1.5, "sliced_wasserstein_distance": 0.02}


def test_a_report_without_rows_says_so():
    for report in ({}, {"rows": []}, {"rows": None}, {"features": "mine"}):
        card = card_of(report)
        assert "Not measured yet." in card.text
        assert card.data.eval_results is None


@pytest.mark.parametrize(
    ("training", "text"),
    [
        ({"seconds": 12.3, "processes": 2}, "It took 12 s in 2 processes."),
        (COST, "It took 12 s in 1 process, and at most 6,759 MiB of memory."),
        ({**COST, "processes": 2}, "in 2 processes, and at most 6,759 MiB of memory in the first."),
    ],
)
def test_a_cost_that_is_not_known_in_full_is_left_out(training, text):
    assert text in card_of({}, training).text
    assert "It took" not in card_of({}, {"seconds": 12.3, "base_model": None}).text


GRIDS = [[500, 0], [440, 220, 0], [440, 330, 220, 110, 0]]


def test_the_card_of_several_grids_says_which_counts_there_are():
    pipeline = HSIVIPipeline(unet=make_unet(), scheduler=HSIVIScheduler(layer_timesteps=GRIDS))
    rows = [{**ROWS[0], "nfe": nfe, "fd": 4.0 / nfe} for nfe in (1, 2, 4)]
    run = {"options": {}, "training": {}, "report": {"rows": [*rows, *ROWS[1:]]}}
    card = ModelCard(str(make_card(pipeline, "alice/several", run, drawn=True)))
    for line in (
        "A sampler of **1, 2 or 4 network calls**, distilled",
        "this model, 4 network calls each](samples.png)",
        "images = pipeline(batch_size=16, num_inference_steps=4).images",
        "part of the sampler: 1, 2 or 4, and no other.",
        "1, 2 or 4 network calls at the timesteps [500], [440, 220] or [440, 330, 220, 110], DDIM layers",
        "It draws with 1, 2 or 4 network calls only.",
        *(f"| {nfe} | **HSIVI, this model** | {4 / nfe:.2f} | 0.0200 | 500 |" for nfe in (1, 2, 4)),
    ):
        assert line in card.text
    names = [result.metric_name for result in card.data.eval_results if result.metric_type == "frechet_distance"]
    assert [name.split(", ")[1] for name in names] == ["1 network call", "2 network calls", "4 network calls"]
    labelled = HSIVIPipeline(unet=make_unet(num_class_embeds=3), scheduler=pipeline.scheduler)
    wanted = "pipeline(batch_size=16, num_inference_steps=4, class_labels=[i % 3 for i in range(16)])"
    assert wanted in make_card(labelled, "alice/several", run).text


def test_what_was_pushed_is_pulled_and_pushed_again(client, pipeline, same, tmp_path):
    first = HfApi().model_info("alice/digits").sha
    pulled = HSIVIPipeline.from_pretrained("alice/digits")
    assert same(pulled)
    assert same(DiffusionPipeline.from_pretrained("alice/digits"))
    assert not same(HSIVIPipeline.from_pretrained("alice/digits", variant="fp16"))
    pulled.save_pretrained(tmp_path / "again")
    assert same(HSIVIPipeline.from_pretrained(tmp_path / "again"))
    with torch.no_grad():
        pulled.unet_noise_scale.log_scale.add_(1.0)
    push(pulled, "alice/digits", exist_ok=True, fp16=False, commit_message="Louder")
    repo = client.repos["alice/digits"]
    head, repo_files = repo.branches["main"], files_of(client, "alice/digits")
    try:
        assert head.title == "Louder"
        assert "unet/diffusion_pytorch_model.fp16.safetensors" not in repo_files  # it was of older weights
        assert not same(HSIVIPipeline.from_pretrained("alice/digits"))
        with signed_in(client, tmp_path / "home", offline=True):
            assert same(HSIVIPipeline.from_pretrained("alice/digits", revision=first))
            assert not same(HSIVIPipeline.from_pretrained("alice/digits"))
    finally:
        repo.branches["main"] = head.parents[0]  # as the other tests found it
    push(pipeline, "org/digits", revision="trial", private=True)
    assert client.repos["org/digits"].private
    assert same(HSIVIPipeline.from_pretrained("org/digits", revision="trial"))


def evil_repos(files, marker):
    """Repos with code that would make a file: in a file of ours, named by the index, and in place of a library."""
    evil = f"open({str(marker)!r}, 'a').write('x')\n".encode()
    index = {**json.loads(files["model_index.json"]), "_class_name": ["pipeline", "HSIVIPipeline"]}
    listed = {"model_index.json": json.dumps(index).encode(), "pipeline.py": evil + files["pipeline.py"]}
    return {
        "alice/evil": {name: evil + data if name.endswith(".py") else data for name, data in files.items()},
        "alice/listed": {**files, **listed},
        "alice/module": {**files, "unet/diffusers.py": evil + b"from diffusers import UNet2DModel\n"},
    }


def test_no_code_of_a_repo_is_run_unless_it_is_trusted(client, same, tmp_path):
    for name, files in evil_repos(files_of(client, "alice/digits"), tmp_path / "ran").items():
        client.add_repo(name, files)
        for cls, options in itertools.product((HSIVIPipeline, DiffusionPipeline), ({}, {"trust_remote_code": False})):
            if name == "alice/evil":
                assert same(cls.from_pretrained(name, **options))
            else:
                with contextlib.suppress(Exception):
                    cls.from_pretrained(name, **options)
    assert same(HSIVIPipeline.from_pretrained("alice/evil", trust_remote_code=True))
    assert not (tmp_path / "ran").exists()


PLAIN = {"alice/one": [700, 300, 0], "alice/several": [[500, 0], [700, 300, 0]]}


@pytest.fixture(scope="module")
def snippets(pushed, tmp_path_factory):
    """The code in the cards of two pipelines without learned noise scales: {repo: [ours, stock, alone]}."""
    found = {}
    with signed_in(pushed, tmp_path_factory.mktemp("home")):
        for name, grids in PLAIN.items():
            scheduler = HSIVIScheduler(layer_timesteps=grids)
            push(HSIVIPipeline(unet=make_unet().eval(), scheduler=scheduler), name)
            card = files_of(pushed, name)["README.md"].decode()
            found[name] = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    return found


DRAWN = "\nassert len(images) == 16 and len(pipeline.scheduler.timesteps) == 2\n"


def test_the_first_snippet_of_the_card_runs(client, snippets):
    for ours, _, _ in snippets.values():
        exec(ours + DRAWN, {})


TRUSTED = """
import os
from diffusers import DiffusionPipeline
os.environ["HF_TOKEN"] = "hf_alice"
from hsivi_diffusers import HSIVIPipeline, push
trusted = DiffusionPipeline.from_pretrained("alice/digits", custom_pipeline="alice/digits", trust_remote_code=True)
assert type(trusted) is not HSIVIPipeline
push(trusted, "alice/trusted")
"""
ALONE = """
from diffusers import DiffusionPipeline
calls = []
def load(x):
    pipeline = DiffusionPipeline.from_pretrained(x, custom_pipeline=x, trust_remote_code=True)
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    return pipeline
pulled = load("alice/digits")
assert same(pulled) and len(calls) == 4
pulled.save_pretrained("again")
assert same(load("./again"))
"""


@pytest.fixture(scope="module")
def apart(pushed, snippets, run_dir, tmp_path_factory):
    """Code that ran in processes of its own, for what works depends on what was imported before.

    The first is of a stranger with an empty cache.
    """
    same = SAME.format(pictures=str(run_dir / "pictures.safetensors"))
    stock, alone = (DRAWN.join([*(codes[place] for codes in snippets.values()), ""]) for place in (1, 2))
    codes = {"stock": stock, "alone": WITHOUT_PACKAGE + same + ALONE + alone, "trusted": TRUSTED}
    home = tmp_path_factory.mktemp("apart")
    return {"home": home, **dict(zip(codes, run_clients([*codes.values()], pushed, home), strict=True))}


@pytest.mark.slow
def test_in_a_process_of_their_own_snippets_run_and_trusted_code_is_pushed_as_ours(apart, pushed):
    for kind in ("stock", "alone", "trusted"):
        assert apart[kind].returncode == 0, apart[kind].stderr
    for kind in ("stock", "alone"):
        assert "non-standard module" not in apart[kind].stderr
    assert HSIVIPipeline.from_pretrained(apart["home"] / "again").unet_noise_scale is not None
    files = files_of(pushed, "alice/trusted")
    assert files.keys() == files_of(pushed, "alice/digits").keys() - {"comparison.png", "curve.png"}
    assert 'custom_pipeline="alice/trusted"' in files["README.md"].decode()
    assert "(samples.png)" in files["README.md"].decode()


def told(error):
    """The message of an error and what was added to it."""
    return "\n".join([str(error.value), *getattr(error.value, "__notes__", [])])


@pytest.mark.parametrize(
    ("name", "options", "remedy"),
    [
        ("alice/new", {"token": "hf_wrong"}, "hf auth login"),
        ("bob/new", {}, "push under your own name"),
        ("alice/digits", {}, "choose another name, or add a commit to it with exist_ok=True"),
    ],
)
def test_a_push_that_the_hub_refuses_is_told_with_the_remedy(client, pipeline, name, options, remedy):
    with pytest.raises(HfHubHTTPError) as refused:
        push(pipeline, name, **options)
    assert remedy in told(refused)
    assert not {"alice/new", "bob/new"} & {*client.repos}
    assert len(client.repos["alice/digits"].branches["main"].parents) == 1


def test_a_repo_is_claimed_if_it_is_ours_and_as_private_as_was_asked(client, pipeline):
    client.add_repo("bob/theirs", author="bob")
    client.add_repo("alice/public")
    with pytest.raises(ValueError, match="alice/public exists and is public, and private=True was asked for"):
        push(pipeline, "alice/public", private=True)
    assert len(client.repos["alice/public"].commits) == 1
    with pytest.raises(HfHubHTTPError) as refused:
        hub.claim("bob/theirs", exist_ok=True)
    assert "This token may not write to bob/theirs: push under your own name" in told(refused)
    hub.claim("alice/digits", exist_ok=True)


def test_no_repo_is_made_for_what_cannot_be_written(client, pipeline, monkeypatch):
    monkeypatch.setattr(hub, "draw_grid", mock.Mock(side_effect=FileNotFoundError))
    with pytest.raises(FileNotFoundError):
        push(pipeline, "alice/unwritten")
    assert "alice/unwritten" not in client.repos


def test_after_a_cut_connection_a_second_push_sends_only_what_is_missing(logged_in, pipeline, run_dir):
    before = contents(run_dir)
    logged_in.refuse_uploads = {3}
    with pytest.raises(CUT) as cut:
        push(pipeline, "alice/cut")
    assert "has arrived is not sent twice" in told(cut)
    assert set(files_of(logged_in, "alice/cut")) == {".gitattributes"}
    arrived = list(logged_in.uploads)
    assert arrived
    push(pipeline, "alice/cut")
    assert not set(arrived) & set(logged_in.uploads[len(arrived) :])
    assert "model_index.json" in files_of(logged_in, "alice/cut")
    assert before == contents(run_dir)


def test_a_commit_that_arrived_before_the_connection_was_cut_is_no_error(logged_in, pipeline):
    logged_in.after_commit = lambda: None
    url = push(pipeline, "alice/cut")
    assert url == f"{logged_in.url}/alice/cut/commit/{logged_in.repos['alice/cut'].branches['main'].sha}"
    assert "model_index.json" in files_of(logged_in, "alice/cut")


def test_a_cut_connection_is_told_with_what_is_known_of_the_repo(logged_in, pipeline, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # of the client, between two tries

    def undo():
        branch = logged_in.repos["alice/cut"].branches
        branch["main"] = branch["main"].parents[0]

    def follow():
        logged_in.repos["alice/cut"].commit({}, "Another", "bob")

    def down():
        logged_in.down = True

    texts = []
    for logged_in.after_commit in (undo, follow, down):
        with pytest.raises(CUT) as cut:
            push(pipeline, "alice/cut")
        texts.append(told(cut))
    assert "alice/cut is as it was." in texts[0]
    for text in texts[1:]:
        assert f"Look at {logged_in.url}/alice/cut first: if the commit arrived, a second push needs" in text
        assert "as it was" not in text


def test_a_teacher_that_the_hub_does_not_know_is_not_named(logged_in, pipeline, run_dir, tmp_path):
    other = shutil.copytree(run_dir, tmp_path / "run")
    for repo, name in (("alice/one", "runs/teacher"), ("alice/two", "/home/alice/teacher")):
        (other / "training.json").write_text(json.dumps({"base_model": name}))
        push(pipeline, repo, run_dir=other)
        card = files_of(logged_in, repo)["README.md"].decode()
        assert "base_model" not in card
        assert "teacher]" not in card


@pytest.mark.parametrize("name", ["samples", "curve"])
def test_a_figure_that_is_a_link_or_no_image_is_refused(run_dir, tmp_path, name):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    file = folder / f"{name}.png"
    secrets = tmp_path / "secrets.png"
    Image.new("L", (1, 1)).save(secrets)
    for target in (secrets, tmp_path / "nothing"):
        file.unlink()
        file.symlink_to(target)
        with pytest.raises(ValueError, match=f"{re.escape(str(file))} is a link, .*: put the image there, or remove"):
            push(make_pipeline(), "alice/new", run_dir=folder)
    for content in (b"no image", (run_dir / f"{name}.png").read_bytes()[:60]):
        file.unlink()
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{re.escape(str(file))} is damaged .*: make it again"):
            push(make_pipeline(), "alice/new", run_dir=folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("report.json", content) for content in (b'{"rows": [', b"\xff{}", b"null")),
        ("options.json", b"null"),
        ("training.json", b'{"seconds": "x", "processes": 1}'),
        ("pipeline/scheduler/scheduler_config.json", b"[1]"),
        ("pipeline/model_index.json", b"[]"),
        ("pipeline/model_index.json", b"{}"),
        ("pipeline/model_index.json", b'{"_class_name": 5}'),
        ("pipeline/model_index.json", b'{"_class_name": "DDPMPipeline", "unet": 5}'),
        ("adapter/" + ADAPTER, b"half"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(run_dir, tmp_path, name, content):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    shutil.copytree(folder / "pipeline", folder / "adapter")
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(folder / name))} is damaged .*: make "):
        push(folder / name.split("/")[0] if "/" in name else make_pipeline(), "alice/new", run_dir=folder)


def with_scheduler(grid=None):
    return HSIVIPipeline(unet=make_unet(), scheduler=HSIVIScheduler(layer_timesteps=grid))


def not_finite():
    pipeline = with_scheduler([500, 0])
    torch.nn.init.constant_(pipeline.unet.conv_out.bias, float("nan"))
    return pipeline


def in_a_stock(pipeline_class, scheduler):
    pipeline = pipeline_class(make_unet(), scheduler)
    pipeline.scheduler = HSIVIScheduler(layer_timesteps=[500, 0])
    return pipeline


NO_TOKEN = "the token is empty or has characters that no token has"
WHOSE = "give user/name or organisation/name"
REFUSED = [
    *((with_scheduler, {"repo_id": repo}, WHOSE) for repo in ("digits", "alice/digits/five", "", None)),
    (with_scheduler, {"base_model": "../teacher"}, f"'../teacher'.*: {WHOSE}"),
    (with_scheduler, {}, "is not an HSIVIScheduler with a trained grid"),
    (not_finite, {}, "unet has weights that are NaN or infinite, the first in conv_out.bias"),
    (make_unet, {}, "push got a UNet2DModel: give a pipeline, or the folder of one"),
    (lambda: None, {}, "push got a NoneType: give a pipeline"),
    (lambda: "runs/digits_t5/pipeline", {}, "holds no pipeline: give a pipeline, or the folder RUN/pipeline"),
    (lambda: in_a_stock(DDIMPipeline, DDIMScheduler()), {}, r"would be lost: push HSIVIPipeline.from_pipe\(pipeline\)"),
    (lambda: in_a_stock(PNDMPipeline, PNDMScheduler()), {}, r"would be lost: push HSIVIPipeline.from_pipe\(pipeline\)"),
    (make_pipeline, {"run_dir": "nowhere"}, "is not a folder: give that of a run"),
    (make_pipeline, {"run_dir": "."}, "holds no run: give the folder that `hsivi distil` wrote"),
    (
        lambda: with_scheduler(GRIDS[1]),
        {"run_dir": None},
        r"other sampler, layer_timesteps=\[800, .* has \[440, 220, 0",
    ),
    (lambda: with_scheduler(GRIDS), {"run_dir": None}, "another sampler, layer_timesteps=.* give its own run, or None"),
    *((make_pipeline, {"token": token}, NO_TOKEN) for token in ("hf_alice\n", "hf alice", "hf_\u00e4lice", "")),
]


@pytest.mark.parametrize(("make", "options", "message"), REFUSED)
def test_what_cannot_be_pushed_is_refused(logged_in, run_dir, tmp_path, monkeypatch, make, options, message):
    monkeypatch.chdir(tmp_path)
    if options.get("run_dir", "") is None:
        options = {"run_dir": run_dir}
    with pytest.raises(ValueError, match=message) as refused:
        push(make(), **{"repo_id": "alice/new", **options})
    assert "hf_" not in told(refused)
    assert "token" not in options or refused.value.__context__ is None
    assert logged_in.repos == {}


def test_the_run_of_several_grids_is_known_by_all_of_them(tmp_path):
    with_scheduler(GRIDS).save_pretrained(tmp_path / "pipeline")
    (tmp_path / "options.json").write_text('{"preset": "fast"}')
    assert read_run(tmp_path, GRIDS)["options"] == {"preset": "fast"}
    for others in (GRIDS[:2], GRIDS[2]):
        with pytest.raises(ValueError, match=r"another sampler, layer_timesteps=\[\[500, 0\], .* give its own run"):
            read_run(tmp_path, others)


def test_a_hub_that_is_not_reached_is_told_with_the_remedy(logged_in, pipeline, tmp_path):
    logged_in.stop()
    with pytest.raises(CUT) as unreached:
        push(pipeline, "alice/new")
    assert "The Hub was not reached, or the connection was cut. Nothing of yours was lost." in told(unreached)
    with signed_in(logged_in, tmp_path / "home", offline=True), pytest.raises(OfflineModeIsEnabled) as offline:
        push(pipeline, "alice/new")
    assert offline.value.__notes__ == ["Unset HF_HUB_OFFLINE to push."]
