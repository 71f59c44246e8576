"""Settings on trial."""

import pytest


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "paper", "level_min": 20}, "level_min=20 has no effect with scoring='own'"),
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
