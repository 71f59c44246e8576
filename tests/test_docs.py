"""Pages and notebooks of the docs do what they say."""

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from nbclient import NotebookClient

import hsivi_diffusers
from hsivi_diffusers import HSIVIConfig, HSIVITrainer, vi
from hsivi_diffusers.distillation import updates
from hsivi_diffusers.distillation.config import removed
from hsivi_diffusers.runs.options import RENAMED
from hsivi_diffusers.runs.output import finished

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
SETTINGS = 'TEACHER = "../assets/digits_ddpm"\nOUTPUT_DIR = {folder!r}\nUPDATES = 2'


# ----- pages -----


def prose_of(page):
    """A page without its blocks of code."""
    return re.sub(r"^ *(`{3,}).*?^ *\1$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors_of(page):
    """The anchors of the headings of a page, as GitHub and Sphinx make them."""
    heads = re.findall(r"^#+ (.*)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-") for head in heads}


def links_of(page):
    """The links of a page to files here: target, and anchor or ""."""
    found = re.findall(r"\]\(([^()\s]+)\)", prose_of(page))
    return [link.partition("#")[::2] for link in found if not re.match(r"\w+:", link)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_links_to_what_is_there(page):
    for target, anchor in links_of(page):
        other = (page.parent / target).resolve() if target else page
        assert other.exists(), target
        assert not anchor or anchor in anchors_of(other), f"{target}#{anchor}"


def test_every_csv_is_linked_from_a_page_beside_it():
    linked = {(page.parent / target).resolve() for page in PAGES for target, _ in links_of(page)}
    assert linked >= {*DOCS.rglob("*.csv")}


def test_the_api_has_every_name_of_the_core():
    assert {*vi.__all__} <= {*re.findall(r"^   (\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)}


def test_version_and_address_are_the_same_wherever_they_are_named():
    """The version is that of `__init__.py`, the address that of setup.cfg."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["repository-code"]) == (hsivi_diffusers.__version__, setup["metadata"]["url"])
    newest, date = re.search(r"^## \[(\S+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).groups()
    assert (newest, date) == (citation["version"], str(citation["date-released"]))
    for page in PAGES:
        named = {*re.findall(r"git\+([^\s\"]+)", page.read_text())}
        assert named in (set(), {setup["metadata"]["url"]}), page
        assert named or page.name not in ("README.md", "install.md"), page


def test_every_option_that_was_removed_or_renamed_is_in_the_notes_of_the_migration():
    notes = (DOCS / "migration.md").read_text()
    assert [name for name in [*removed(HSIVIConfig()), *RENAMED, *RENAMED.values()] if f"`{name}`" not in notes] == []


@pytest.mark.parametrize("name", ["distil", "infer"])
def test_a_notebook_is_stored_with_its_images_and_without_progress_bars(name):
    path = DOCS / f"{name}.ipynb"
    outputs = [each for cell in nbformat.read(path, as_version=4).cells for each in cell.get("outputs", [])]
    assert any("image/png" in each.get("data", {}) for each in outputs)
    assert not any(each.output_type == "error" or each.get("name") == "stderr" for each in outputs)
    assert path.stat().st_size < 500_000


def test_the_pages_are_short_enough_to_be_read():
    """Words have a letter or a digit: bars and rules of tables are none."""
    pages = [*DOCS.rglob("*.md"), *DOCS.glob("*.ipynb")]
    assert sum(len(re.findall(r"\S*\w\S*", page.read_text())) for page in pages) <= 30_000


def test_blocks_of_shell_are_marked_as_such():
    for page in PAGES:
        blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", page.read_text(), re.DOTALL | re.MULTILINE)
        unmarked = [code for mark, code in blocks if not mark]
        assert not [code for code in unmarked if re.match(r" *(hsivi|python|make|pip|accelerate) ", code)]


def test_every_block_of_the_readme_imports_what_it_uses():
    assert (blocks := re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))
    for code in blocks:
        check = [sys.executable, "-m", "ruff", "check", "--select=F", "--isolated", "-"]
        subprocess.run(check, input=code, text=True, check=True)


# ----- a teacher of the user's own -----


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The names that the code of the page has made; where it ran, since it names a folder there."""
    names = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("own"))
        for code in re.findall(r"```python\n(.*?)```", (DOCS / "distil" / "own_teacher.md").read_text(), re.DOTALL):
            exec(code, names)
        yield names


def averaged(trainer):
    with trainer.state.averaging() as student:
        return {name: weight.clone() for name, weight in student.network.state_dict().items()}


def test_a_plain_network_is_distilled_resumed_loaded_and_started_from(own, tmp_path, monkeypatch, same_tensors):
    teacher, config = own["teacher"], own["config"]
    for images in (own["images"], own["trainer"].pipeline(batch_size=4).images):
        assert images.shape == (4, 1, 8, 8)
        assert 0 <= images.min() < images.max() <= 1
    drawn = own["trainer"].pipeline(batch_size=4, generator=torch.Generator().manual_seed(0)).images
    assert torch.equal(drawn, own["images"])  # of the student that was loaded
    whole = averaged(own["trainer"])
    assert not same_tensors(whole, teacher.network.state_dict())

    def stop(trainer, step):
        if step.step == 5:
            trainer.accelerator.set_trigger()

    monkeypatch.setattr(updates, "PAIR_STEPS", 2)
    given = {"num_inference_steps": 2, "max_train_steps": 20, "train_batch_size": 8, "validation_steps": 0}
    again = HSIVIConfig(**given, output_dir=tmp_path / "again")
    with pytest.raises(Exception, match="saved after update 6"):
        HSIVITrainer(teacher, again, callbacks=[stop]).train()
    assert [path.name for path in finished(tmp_path / "again")] == ["checkpoint-6"]
    resumed = HSIVITrainer(teacher, again)
    resumed.train("latest")
    assert same_tensors(averaged(resumed), whole)

    given["num_inference_steps"] = 1
    given["num_pairs"] = 8
    further = HSIVITrainer(teacher, HSIVIConfig(**given, init_from=config.output_dir, output_dir=tmp_path / "one"))
    assert same_tensors(further.state.student.network.state_dict(), whole)
    further.train()
    assert further.pipeline(batch_size=1).images.isfinite().all()
    pairs = HSIVITrainer(teacher, HSIVIConfig(**given, output_dir=tmp_path / "pairs"))
    assert pairs.train()["network_calls"] > 15 * 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_inference_steps": [1, 2]}, r"num_inference_steps=\[1, 2\]: a ConvNet has no free class embedding"),
        ({"lora_rank": 4}, "lora_rank=4: no stock pipeline loads a LoRA of a ConvNet: set lora_rank=0"),
        ({"noise_scale_type": "per_pixel"}, "noise_scale_type='per_pixel' needs a UNet2DModel, and the teacher is a"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing=True: a ConvNet has none: leave it out"),
        ({"guidance_scale": 3.0}, "guidance_scale was given, and the teacher has no class labels"),
        ({"prompts": ["a"], "guidance_scale": 1.0}, "prompts was given, and the teacher takes no text"),
    ],
)
def test_what_a_plain_network_cannot_do_is_refused(own, settings, message):
    with pytest.raises(ValueError, match=message):
        HSIVITrainer(own["teacher"], HSIVIConfig(**{"num_inference_steps": 2, **settings}))


def test_a_network_whose_weights_are_not_finite_is_refused(own, monkeypatch):
    monkeypatch.setattr(own["teacher"].network.first.bias, "data", torch.full((16,), torch.nan))
    with pytest.raises(ValueError, match="the ConvNet has weights that are NaN or infinite, the first in first.bias"):
        HSIVITrainer(own["teacher"], HSIVIConfig())


@pytest.fixture
def notebook(tmp_path):
    """With two updates, into tmp_path / "run"."""
    notebook = nbformat.read(DOCS / "distil.ipynb", as_version=4)
    settings = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert settings.source.startswith('TEACHER = "../assets/digits_ddpm"')
    settings.source = SETTINGS.format(folder=str(tmp_path / "run"))
    return notebook


def run_cell(source, names):
    """Runs a cell and returns the value of its last line, which a notebook shows."""
    *lines, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        return exec(source, names)
    exec(compile(ast.Module(lines, []), "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def test_the_notebook_distils_and_shows_images(notebook, tmp_path, monkeypatch):
    """Without Jupyter, which needs a process that imports everything again."""
    monkeypatch.chdir(DOCS)
    names = {}
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    _, trained, *shown = [run_cell(source, names) for source in code]
    assert "network calls" in trained
    assert len(shown) == 2
    for image in shown:
        assert image._repr_png_().startswith(b"\x89PNG")
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()


@pytest.mark.slow
def test_the_notebook_runs_in_jupyter(notebook, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(DOCS)}}).execute()
    _, training, *shown = (cell for cell in notebook.cells if cell.cell_type == "code")
    assert "network calls" in training.outputs[-1]["data"]["text/plain"]
    for cell in shown:
        assert "image/png" in cell.outputs[-1]["data"]


@pytest.mark.slow
def test_the_notebook_of_inference_finds_the_posterior(monkeypatch):
    """With what it prints last: the largest error of a mean and ratios of standard deviations."""
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))
    infer = nbformat.read(DOCS / "infer.ipynb", as_version=4)
    notebook = NotebookClient(infer, timeout=600, resources={"metadata": {"path": str(DOCS)}}).execute()
    *_, compared, figure = (cell for cell in notebook.cells if cell.cell_type == "code")
    errors, ratios = (
        [float(number) for number in re.findall(r"\d+\.\d+", line)] for line in compared.outputs[0]["text"].splitlines()
    )
    assert max(errors) < 0.1
    assert 0.9 < min(ratios) <= max(ratios) < 1.1
    assert "image/png" in figure.outputs[-1]["data"]
