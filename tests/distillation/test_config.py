"""`HSIVIConfig`: what is given, what the preset fills in, and what a run records."""

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from hsivi_diffusers import HSIVIConfig
from hsivi_diffusers.distillation.config import PRESETS, complete, read_settings, removed, usual_options


@pytest.mark.parametrize(
    ("given", "preset"),
    [
        ({}, "fast"),
        ({"num_inference_steps": 1}, "one_call"),
        ({"num_inference_steps": 1, "preset": "fast"}, "one_call"),
        ({"num_inference_steps": 1, "preset": "paper"}, "paper"),
        ({"num_inference_steps": [1, 2]}, "fast"),
        ({"prompts": ["a cat"]}, "latent"),
        ({"prompts": ["a cat"], "preset": "fast"}, "fast"),
    ],
)
@pytest.mark.parametrize("again", [lambda config: config, replace, copy.deepcopy, lambda c: replace(copy.deepcopy(c))])
def test_the_preset_follows_from_steps_and_prompts_unless_it_is_given(given, preset, again):
    config = again(HSIVIConfig(**given))
    assert config.preset == preset
    values = {name: value for name, value in PRESETS[preset].items() if name != "num_pairs"}  # which steps decide, too
    assert {name: getattr(config, name) for name in values} == values
    assert config == HSIVIConfig(**given)


@pytest.mark.parametrize(
    ("given", "pairs"),
    [
        ({"num_inference_steps": 1}, 6400),
        ({"num_inference_steps": 2}, 0),
        ({"num_inference_steps": 3}, 6400),
        ({"num_inference_steps": [4, 8]}, 6400),
        ({"max_train_steps": 100}, 1600),
        ({"num_inference_steps": [1, 2, 4, 8]}, 6400),
        ({"num_inference_steps": [1, 2]}, 0),
        ({"num_pairs": 0}, 0),
        ({"init_from": "runs/student"}, 6400),
        ({"num_inference_steps": 2, "init_from": "runs/student"}, 0),
        ({"num_inference_steps": 1, "init_from": "runs/student", "preset": "latent"}, 0),
        ({"num_inference_steps": 1, "init_from": "runs/student"}, 6400),
        ({"num_inference_steps": 1, "init_from": "runs/student", "noise_scale_type": "per_pixel"}, 0),
        ({"noise_scale_type": "per_pixel"}, 0),
        ({"preset": "paper"}, 0),
        ({"preset": "latent"}, 0),
    ],
)
def test_the_first_of_three_steps_or_more_learns_from_pairs_as_one_step_does(given, pairs):
    assert HSIVIConfig(**given).num_pairs == pairs


@pytest.mark.parametrize(
    ("given", "change"),
    [
        ({}, {"num_inference_steps": 1}),
        ({"num_inference_steps": 1}, {"num_inference_steps": 4}),
        ({"preset": "paper"}, {"preset": "fast"}),
        ({"preset": "fast"}, {"prompts": ["a cat"]}),
        ({"num_inference_steps": 1, "preset": "fast"}, {"prompts": ["a cat"]}),
        ({"num_inference_steps": 1}, {"prompts": ["a cat"]}),
        ({"learning_rate": 0.5, "noise_eta": 1.0}, {"preset": "paper"}),
        ({"max_train_steps": 6, "num_inference_steps": 1}, {"max_train_steps": 1000}),
        ({"num_inference_steps": 1}, {"init_from": "runs/before"}),
    ],
)
def test_a_changed_copy_is_what_the_same_options_make(given, change):
    """`dataclasses.replace` passes on what was given, and the new preset fills in the rest."""
    changed = replace(HSIVIConfig(**given), **change)
    assert changed == HSIVIConfig(**{**given, **change})
    assert replace(pickle.loads(pickle.dumps(changed))) == changed


def test_an_attribute_that_was_set_counts_as_given():
    config = HSIVIConfig()
    config.learning_rate = 0.5
    assert replace(config, num_inference_steps=1).learning_rate == 0.5


def test_short_runs_and_runs_that_go_on_need_no_long_start():
    assert HSIVIConfig(num_inference_steps=1, max_train_steps=12).critic_first == 2
    again = HSIVIConfig(num_inference_steps=1, init_from="runs/before")
    assert (again.num_pairs, again.critic_first) == (6400, 0)
    assert replace(again, prompts=["a"]).num_pairs == 0
    assert HSIVIConfig(num_inference_steps=1, prompts=["a"]).num_pairs == 1920


def test_a_path_to_a_file_called_default_is_a_file():
    assert HSIVIConfig(prompts="default").record()["prompts"] == "default"
    path = HSIVIConfig(prompts=Path("default")).record()["prompts"]
    assert path != "default"
    assert Path(path) == Path("default")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("num_inference_step", "; did you mean num_inference_steps?"),
        ("batch_size", "; did you mean train_batch_size?"),
        ("guidance_falls", "; did you mean decay_guidance?"),
        ("xyzzy", ""),
    ],
)
def test_an_unknown_option_is_refused_with_the_one_that_was_meant(name, hint):
    with pytest.raises(ValueError, match=f"^{name} is no option of HSIVIConfig") as refused:
        HSIVIConfig(**{name: 4})
    assert str(refused.value) == f"{name} is no option of HSIVIConfig{hint}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": True}, "learning_rate=True has the type bool: give float"),
        ({"max_train_steps": "10"}, "max_train_steps='10' has the type str: give int"),
        ({"max_train_steps": 10.0}, "max_train_steps=10.0 has the type float: give int"),
        ({"max_grad_norm": "1"}, r"max_grad_norm='1' has the type str: give float \| None"),
        ({"seed": None}, "seed=None has the type NoneType: give int"),
        ({"objective": None}, r"objective=None has the type NoneType: give Literal\['SM', 'KL'\]"),
        ({"allow_tf32": 1}, "allow_tf32=1 has the type int: give bool"),
        ({"num_inference_steps": "4"}, r"num_inference_steps='4' has the type str: give int \| list\[int\]"),
        ({"num_inference_steps": [1, "4"]}, r"num_inference_steps=\[1, '4'\] has the type list: give int"),
        ({"preset": "quick"}, "preset='quick' is unknown: choose one of fast, one_call, paper, latent"),
    ],
)
def test_a_value_of_another_type_is_refused_when_the_config_is_made(settings, message):
    with pytest.raises(ValueError, match=message) as refused:
        HSIVIConfig(**settings)
    assert "\n" not in str(refused.value)


def test_values_that_mean_the_same_are_the_same():
    HSIVIConfig(max_grad_norm=1, noise_eta=1, validation_steps=None).check()
    config = HSIVIConfig(num_inference_steps=(4, 1), output_dir=Path("runs"), init_from=Path("other"))
    assert (config.depths, config.output_dir, config.init_from) == ([1, 4], "runs", "other")
    assert HSIVIConfig(guidance_scale=[2.0]).guidance_scale == HSIVIConfig(guidance_scale=2).guidance_scale == 2
    assert HSIVIConfig(guidance_scale=[2.0, 1.0]) == HSIVIConfig(guidance_scale=[1.0, 2.0])


def test_the_precision_is_that_of_the_launcher_unless_the_config_says_one(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert HSIVIConfig().precision == "bf16"
    assert HSIVIConfig(mixed_precision="no").precision == "no"


def test_a_record_is_read_back(tmp_path):
    config = HSIVIConfig(num_inference_steps=1, learning_rate=0.5)
    (tmp_path / "options.json").write_text(json.dumps({"revision": None, **config.record()}))
    assert read_settings(tmp_path / "options.json") == {"revision": None, **config.record()}


@pytest.mark.parametrize("preset", PRESETS)
def test_what_differs_from_the_preset_is_what_was_given(monkeypatch, preset):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    plain = HSIVIConfig(num_inference_steps=4, preset=preset, max_train_steps=60).record()
    assert plain == usual_options(plain)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    given = {"init_from": "runs/a", "learning_rate": 0.5, "validation_steps": 0, "num_inference_steps": [1, 2]}
    record = HSIVIConfig(preset=preset, **given).record()
    usual = usual_options(record)
    differing = {name for name, value in record.items() if value != usual[name]}
    assert differing == {"init_from", "learning_rate", "validation_steps", "mixed_precision"}


@pytest.mark.parametrize("record", [{"preset": "x"}, {"num_inference_steps": ["a"]}, {"max_train_steps": [1]}])
def test_a_damaged_record_has_no_usual_options(record):
    assert usual_options(record) == {}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_record_of_version_0_2_is_read_if_what_was_removed_changes_nothing(preset):
    config = HSIVIConfig(preset=preset, num_inference_steps=1, guidance_scale=3.0, decay_guidance=False)
    record = {name: value for name, value in config.record().items() if name != "adam_beta1"}  # which came later
    record["guidance_falls"] = record.pop("decay_guidance")
    assert complete({**record, **removed(config), "num_inference_steps": 1}) == config.record()


# As version 0.2 had them.
OF_0_2 = {
    "fast": {"start_signal": 3.2, "start_noise": None, "loss_weight": "unit", "clip_images": True},
    "one_call": {"start_signal": None, "start_noise": 2.5, "loss_weight": "unit", "clip_images": True},
    "paper": {"start_signal": None, "start_noise": None, "loss_weight": "sigma2", "clip_images": False},
    "latent": {"start_signal": None, "start_noise": 4.15, "loss_weight": "unit", "clip_images": True},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_what_was_removed_follows_as_the_presets_of_version_0_2_had_it(preset):
    now = removed(HSIVIConfig(preset=preset, num_inference_steps=2))
    assert {name: now[name] for name in OF_0_2[preset]} == OF_0_2[preset]
    paper = ("simulate", "constant_with_warmup")
    assert (now["source"], now["critic_lr_scheduler"]) == (paper if preset == "paper" else ("pool", "cosine"))


@pytest.mark.parametrize(
    ("given", "name", "value", "accepted"),
    [
        ({}, "pair_steps", 3, False),
        ({}, "pair_steps", 500, False),  # its pairs led to images
        ({"num_pairs": 0}, "pair_steps", 500, True),
        ({"num_inference_steps": 1}, "pair_steps", 500, True),
        ({}, "start_noise", 9.0, False),
        ({}, "loss_weight", "sigma2", False),
        ({"preset": "paper"}, "loss_weight", "sigma2", True),
        ({}, "clip_images", False, False),
        ({}, "source", "simulate", False),
        ({}, "critic_lr_scheduler", "constant_with_warmup", False),
        ({"start_timestep": 500}, "start_signal", None, True),
        ({"start_timestep": 500}, "start_signal", 3.2, False),
        ({"guidance_scale": 2.0}, "guidance_scale", [2.0], True),  # the same in another form
        ({"guidance_scale": [1.0, 3.0]}, "guidance_scale", [3.0, 1.0], True),
        ({}, "start_spacing", 0, True),
        ({"num_inference_steps": [1, 2]}, "start_spacing", 0, False),  # several grids start 20 apart now
        ({"num_inference_steps": [1, 2]}, "start_spacing", 20, True),
        ({"num_inference_steps": [1, 2], "preset": "paper"}, "start_spacing", 0, True),  # but not these
        ({"num_inference_steps": [1, 2], "preset": "paper", "start_timestep": 500}, "start_spacing", 0, False),
    ],
)
def test_a_record_that_needs_an_option_that_was_removed_is_refused(given, name, value, accepted):
    record = HSIVIConfig(**given).record()
    if accepted:
        assert complete({**record, name: value}) == record
        return
    with pytest.raises(ValueError, match=f"trained with {name}={value!r}, and the option was removed") as refused:
        complete({**record, name: value})
    assert "\n" not in str(refused.value)
