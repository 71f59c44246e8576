"""Settings on trial."""

import pytest


def test_the_bridge_has_the_power(make_state):
    assert make_state(level_power=2.0).bridge.level_power == 2.0


def test_the_power_changes_the_run(distil, fast_run, tmp_path, differences):
    changed = differences(distil(tmp_path / "run", preset="fast", level_power=3.0), fast_run)
    assert any(name.startswith("pipeline/unet") for name in changed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"level_power": 0.0}, "level_power=0.0: give a number above 0"),
        ({"preset": "paper", "level_min": 20}, "level_min=20 has no effect with scoring='own'"),
        ({"scoring": "own", "level_power": 2.0}, "level_power=2.0 has no effect with scoring='own'"),
        ({"start_spacing": 20}, "start_spacing=20 has no effect with one step count, 2: give several"),
        (
            {"preset": "paper", "start_spacing": 20},
            "start_spacing=20 needs start_timestep, start_signal or",
        ),
        ({"kernel": "renoise"}, "scoring='between' needs kernel='ddim', got 'renoise'"),
        ({"objective": "SM"}, "scoring='between' with objective='SM': .* set objective to 'KL', or scoring to 'random"),
    ],
)
def test_what_cannot_run_is_refused_before_any_work(distil, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        distil(tmp_path / "run", pretrained_teacher_model="nowhere", **settings)
    assert not (tmp_path / "run").exists()
