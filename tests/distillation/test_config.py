"""The presets of `HSIVIConfig`."""

import pytest

from hsivi_diffusers.distillation.config import PRESETS, HSIVIConfig


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_can_be_printed_with_every_value(preset):
    config = HSIVIConfig(preset=preset)
    assert config.preset == preset
    assert "ByPreset" not in repr(config)
    assert f"preset={preset!r}" in repr(config)
    config.check()
    assert "ByPreset" not in repr(config.settings())


@pytest.mark.parametrize(
    ("given", "preset", "found"),
    [
        ({}, "fast", {"objective": "KL", "num_pairs": 0, "start_signal": 3.2, "start_noise": None}),
        ({"num_inference_steps": [1, 2]}, "fast", {"num_pairs": 0, "critic_first": 0}),
        ({"num_inference_steps": 1}, "one_call", {"num_pairs": 6400, "critic_first": 50, "max_grad_norm": 20.0}),
        ({"num_inference_steps": 1, "preset": "fast"}, "one_call", {"start_signal": None, "start_noise": 2.5}),
        ({"num_inference_steps": 1, "preset": "paper"}, "paper", {"num_pairs": 0, "objective": "SM"}),
        ({"preset": "paper"}, "paper", {"critic_updates": 20, "noise_eta": 0.2, "start_signal": None}),
        ({"preset": "paper", "critic_updates": 3}, "paper", {"critic_updates": 3, "noise_eta": 0.2}),
        ({"num_inference_steps": 1, "num_pairs": 7}, "one_call", {"num_pairs": 7, "critic_updates": 2}),
        ({"num_inference_steps": 1, "critic_updates": 1}, "one_call", {"num_pairs": 6400, "critic_updates": 1}),
        ({"start_noise": 4.0}, "fast", {"start_signal": None, "start_noise": 4.0}),
        ({"num_inference_steps": 1, "start_signal": 3.2}, "one_call", {"start_signal": 3.2, "start_noise": None}),
        (
            {"num_inference_steps": 1, "start_timestep": 300},
            "one_call",
            {"start_timestep": 300, "start_signal": None, "start_noise": None},
        ),
        ({"num_inference_steps": 1, "max_train_steps": 5}, "one_call", {"critic_first": 0}),
        ({"num_inference_steps": 1, "max_train_steps": 60}, "one_call", {"critic_first": 10}),
        (
            {"num_inference_steps": 1, "init_from": "runs/other"},
            "one_call",
            {"num_pairs": 0, "critic_first": 0, "learning_rate": 3e-5},
        ),
        ({"num_inference_steps": 1, "init_from": "runs/other", "num_pairs": 7}, "one_call", {"num_pairs": 7}),
    ],
)
def test_a_preset_sets_what_is_not_given(given, preset, found):
    config = HSIVIConfig(**given)
    assert config.preset == preset
    assert {name: getattr(config, name) for name in found} == found


def test_an_unknown_preset_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="preset='slow' is unknown: choose one of fast, one_call, paper"):
        HSIVIConfig(preset="slow")
