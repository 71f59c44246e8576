"""Code that loads the student of a run."""

import pytest

from hsivi_diffusers.runs.artifacts import read_json
from hsivi_diffusers.runs.student_code import call_arguments, literal, student_code
from tiny_text import PROMPTS


def result_of(run, monkeypatch):
    """Runs the code of a run in the folder above it, and returns the images."""
    monkeypatch.chdir(run.parent)
    options, training = (read_json(run / f"{name}.json") for name in ("options", "training"))
    code = student_code(run / "pipeline", f"{run.name}/pipeline", options, training)
    names = {}
    exec(code, names)
    return names["images"]


@pytest.mark.parametrize("kind", ["fast_run", "several_run", "class_run"])
def test_the_code_for_a_student_on_pixels_draws(request, kind, monkeypatch):
    images = result_of(request.getfixturevalue(kind), monkeypatch)
    assert [image.size for image in images] == [(8, 8)] * 16


@pytest.mark.parametrize("rank", [2, 0])
def test_the_code_for_a_lora_and_for_a_pipeline_of_text_draws(distil, text_teachers, tmp_path, monkeypatch, rank):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    options = {"pretrained_teacher_model": text_teachers("sd"), "prompts": tmp_path / "prompts.txt"}
    options |= {"guidance_scale": 2.0, "lora_rank": rank, "train_batch_size": 2, "start_timestep": 899}
    run = distil(tmp_path / "run", **options, max_train_steps=1, critic_updates=1, lr_warmup_steps=0)
    assert [image.size for image in result_of(run, monkeypatch)] == [(16, 16)]


def test_the_code_for_a_pipeline_of_classes_gives_one(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    code = student_code(tmp_path, "run/pipeline", {"num_inference_steps": [1, 2]}, {"call": {"guidance_scale": 1.0}})
    assert code.splitlines()[1] == "from diffusers import DiTPipeline"
    assert code.endswith("pipeline(class_labels=[0], num_inference_steps=2, guidance_scale=1).images")


@pytest.mark.parametrize("index", ["{}", "{", '{"_class_name": "os; x"}', '{"_class_name": null}'])
def test_a_folder_without_a_pipeline_is_loaded_with_its_teacher(tmp_path, index):
    (tmp_path / "model_index.json").write_text(index)
    assert 'load_student("run/pipeline", teacher)' in student_code(tmp_path, "run/pipeline", {}, {})


@pytest.mark.parametrize("text", ["runs/a", "it's", 'a "b"', "a\\b\n", "\u00e9\udc80", "'\""])
def test_any_path_is_a_string_literal(text):
    assert eval(literal(text)) == text


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ({"guidance_scale": 4.5, "height": 64, "clean": False}, ["guidance_scale=4.5", "height=64", "clean=False"]),
        ({"x=1); print(": 1, "y": "1); print("}, ["y='1); print('"]),
        (None, ["guidance_scale=1"]),
        (["x"], ["guidance_scale=1"]),
    ],
)
def test_arguments_of_a_record_are_names_and_literals(call, code):
    assert call_arguments({"call": call}) == code
