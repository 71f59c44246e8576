"""Settings on trial: levels, and the critic's target."""

import pytest

from hsivi_diffusers import HSIVIScheduler, TeacherBridge, load_teacher
from hsivi_diffusers.distillation.config import HSIVIConfig
from hsivi_diffusers.distillation.plan import measure, read_configs
from hsivi_diffusers.distillation.trials import Trials
from hsivi_diffusers.distillation.updates import make_objective
from hsivi_diffusers.vi import KullbackLeibler, ScoreMatching


def test_the_objective_has_the_share(teacher):
    unet, schedule = load_teacher(str(teacher))
    bridge = TeacherBridge(unet, HSIVIScheduler.from_config(schedule.config, layer_timesteps=[440, 220, 0]))
    for preset, kind in (("fast", KullbackLeibler), ("paper", ScoreMatching)):
        objective = make_objective(HSIVIConfig(preset=preset, trials=Trials(teacher_share=0.3)), bridge)
        assert (type(objective), objective.teacher_share) == (kind, 0.3)


def test_the_bridge_has_the_power(make_state):
    assert make_state(level_power=2.0).bridge.level_power == 2.0


@pytest.mark.parametrize("settings", [{"level_power": 3.0}, {"teacher_share": 0.5}], ids=lambda each: next(iter(each)))
def test_each_setting_changes_the_run(distil, fast_run, tmp_path, differences, settings):
    changed = differences(distil(tmp_path / "run", preset="fast", **settings), fast_run)
    assert any(name.startswith("pipeline/unet") for name in changed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_share": 1.0}, "teacher_share=1.0: give a number from 0 to below 1"),
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


def test_a_plan_counts_the_calls_of_the_share(make_config, teacher, fresh_accelerator):
    cost = measure(*read_configs(str(teacher), None), make_config(critic_updates=1, teacher_share=0.5))
    assert cost.calls == {"student": 1, "critic": 1, "teacher": 2}
