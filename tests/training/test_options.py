import json
import os
import re
import runpy
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest
import yaml

import hsivi_diffusers
from hsivi_diffusers.commands import cli, evaluate
from hsivi_diffusers.commands.options import parse_options, run_command
from hsivi_diffusers.distillation.config import ALIASES, GONE, PRESETS, HSIVIConfig, read_settings
from hsivi_diffusers.runs.options import differences, flatten, option
from hsivi_diffusers.runs.output import Output
from training.benchmarks.images import train_baseline, train_classifier, train_teacher, tune_solvers
from training.benchmarks.text import train_scorer, train_text_teacher, train_vae

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
SETS = ("fashion", "emoji", "mnist")
BASELINES = ("consistency", "progressive", "regression")
OLD_NAMES = {"pace": "rate"}


@dataclass
class Method:
    _group = "method"
    law: Literal["normal", "uniform", "no"] = option("normal", "a choice")
    start: int | None = option(7, "may be left out", common=False)


@dataclass
class Training:
    _group = "training"
    rate: float = option(1.0, "a number")
    steps: int = option(1, "a count")
    name: str = option("plain", "a text")
    keep: bool = option(False, "a switch", common=False)
    widths: list[int] = option([3, 4], "a list")
    counts: int | list[int] = option(2, "one or several")


@pytest.fixture
def parse(tmp_path):
    """Parses a YAML text and a command line into one dictionary."""

    def run(text=None, *args):
        config = []
        if text is not None:
            path = tmp_path / "options.yaml"
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
            config = ["--config", str(path)]
        groups = parse_options([Method, Training], "About.", [*config, *args], "quiz", OLD_NAMES)
        assert [type(group) for group in groups] == [Method, Training]
        return {**vars(groups[0]), **vars(groups[1])}

    return run


@pytest.fixture
def refused(parse, capsys):
    """Parses what must end with exit status 2, and returns the message."""

    def run(text, *args):
        with pytest.raises(SystemExit) as exit:
            parse(text, *args)
        assert exit.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return run


def test_defaults_are_those_of_the_dataclasses(parse):
    assert parse() == {
        "law": "normal",
        "start": 7,
        "rate": 1.0,
        "steps": 1,
        "name": "plain",
        "keep": False,
        "widths": [3, 4],
        "counts": 2,
    }


def test_a_list_is_not_shared_between_two_calls(parse):
    parse(None)["widths"].append(5)
    assert parse(None)["widths"] == [3, 4]


@pytest.mark.parametrize(
    ("text", "args", "wanted"),
    [
        ("name: x", [], (1.0, 1)),
        ("rate: 0.5", [], (0.5, 1)),
        ("rate: 0.5", ["--rate", "0.7"], (0.7, 1)),
        ("rate: 0.5", ["--steps=3"], (0.5, 3)),
        ("pace: 0.5", [], (0.5, 1)),
        ("pace: 0.5", ["--pace", "0.7"], (0.7, 1)),
        ("rate: 0.5", ["--pace=0.7"], (0.7, 1)),
    ],
)
def test_the_command_line_wins_over_yaml_under_names_old_or_new(parse, text, args, wanted):
    options = parse(text, *args)
    assert (options["rate"], options["steps"]) == wanted


def test_a_file_wins_over_settings_of_before_and_these_over_defaults(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("rate: 0.5")
    words, before = ["--config", str(path), "--steps=7"], {"rate": 0.1, "steps": 9, "keep": True, "gone": 1}
    (options,) = parse_options([Training], "About.", words, "quiz", OLD_NAMES, before)
    assert (options.rate, options.steps, options.keep, options.name) == (0.5, 7, True, "plain")


def test_without_args_the_command_line_of_the_program_is_read(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", "--rate", "0.25"])
    assert parse_options([Method, Training], "About.")[1].rate == 0.25


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("rate: 1e-4", "rate", 1e-4),
        ("rate: 1.0e-4", "rate", 1e-4),
        ("rate: 3", "rate", 3.0),
        ("rate: -1e-4", "rate", -1e-4),
        ("steps: 12", "steps", 12),
        ("start: 5", "start", 5),
        ("name: 12", "name", "12"),
        ("name: a b", "name", "a b"),
        ("keep: true", "keep", True),
        ("keep: false", "keep", False),
        ("widths: [8, 16, 32]", "widths", [8, 16, 32]),
        ("widths: 8", "widths", [8]),
        ("widths: []", "widths", []),
        ("law: uniform", "law", "uniform"),
        ("law: no", "law", "no"),
        ("counts: 4", "counts", [4]),
        ("counts: [4, 8]", "counts", [4, 8]),
    ],
)
def test_yaml_values_have_the_type_of_the_option(parse, text, key, value):
    found = parse(text)[key]
    assert found == value
    assert type(found) is type(value)


def test_null_is_none_where_the_option_takes_it_and_the_default_elsewhere(parse):
    options = parse("start: null\nrate: null")
    assert (options["start"], options["rate"]) == (None, 1.0)


def test_lists_and_switches_on_the_command_line(parse):
    options = parse("widths: [1, 2, 3]", "--widths", "5", "6", "--keep")
    assert (options["widths"], options["keep"]) == ([5, 6], True)


def test_an_unknown_yaml_key_is_named_with_its_close_match(refused):
    message = refused("stepz: 3")
    assert "options.yaml" in message
    assert "unknown option `stepz`" in message
    assert "did you mean `steps`?" in message


def test_an_unknown_yaml_key_without_a_match_points_to_help(refused):
    message = refused("qqqqqq: 3")
    assert "`qqqqqq`" in message
    assert "--help" in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [1", "cannot be read"),
        (b"name: \xff\xfe", "cannot be read"),
        ("", "must hold lines of `option: value`, got NoneType"),
        ("- rate", "must hold lines of `option: value`, got list"),
    ],
)
def test_malformed_yaml_is_refused(parse, capsys, text, part):
    with pytest.raises(SystemExit) as exit:
        parse(text)
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert part in message
    assert "options.yaml" in message


def test_a_missing_config_is_refused(refused, tmp_path):
    assert "nowhere.yaml cannot be read" in refused(None, "--config", str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize(
    ("text", "option", "value"),
    [
        ("law: foo", "--law", "'foo'"),
        ("rate: fast", "--rate", "'fast'"),
        ("steps: 1.5", "--steps", "'1.5'"),
        ("widths: [1, x]", "--widths", "'x'"),
    ],
)
def test_a_bad_value_in_yaml_is_refused_like_one_on_the_command_line(refused, text, option, value):
    message = refused(text)
    assert option in message
    assert value in message


@pytest.mark.parametrize("args", [["--bogus", "1"], ["--step", "1"], ["stray"]])
def test_an_unknown_argument_is_refused(refused, args):
    assert "unrecognized arguments: " + " ".join(args) in refused(None, *args)


def test_an_error_is_one_line_that_names_the_program(parse, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(None, "--law", "foo")
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: argument --law: invalid choice: 'foo' (choose from ")
    assert line.endswith("(see `quiz --help`)")


# ----- the configs of the repository -----


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        *[
            (f"{name}_teacher", [train_teacher.Data, train_teacher.Network, train_teacher.Training, Output])
            for name in ("digits", "digits_guided", "digits_flow", *SETS)
        ],
        ("emoji_vae", [train_vae.Autoencoder, train_teacher.Training, Output]),
        ("emoji_text", [train_text_teacher.Text, train_teacher.Training, Output]),
        ("emoji_scorer", [train_scorer.Training]),
        ("emoji_lcm", [train_baseline.Teacher, train_baseline.Training, Output]),
        ("digits_evaluation", [evaluate.Evaluation]),
        *[
            (f"{name}_{method}", [train_baseline.Teacher, train_baseline.Training, Output])
            for name in ("digits", *SETS)
            for method in BASELINES
        ],
        *[(f"{name}_classifier", [train_classifier.Data, train_classifier.Training]) for name in SETS],
        *[(f"solvers_{name}", [tune_solvers.Options]) for name in ("digits", "guided", "flow", "text", *SETS)],
    ],
)
def test_the_configs_parse_for_their_programs(name, groups):
    path = CONFIGS / f"{name}.yaml"
    options = flatten(parse_options(groups, "", ["--config", str(path)]))
    assert differences(options, yaml.safe_load(path.read_text())) == ""


@pytest.mark.parametrize("name", ["digits", "guided", "text", *SETS])
def test_the_configs_parse_for_the_benchmark(name):
    from training.benchmarks.images import benchmark

    test_the_configs_parse_for_their_programs(f"benchmark_{name}", [benchmark.Options])


@pytest.mark.parametrize("name", ["digits_t5", "digits_t1248", "fashion_t4", "emoji_t4", "mnist_t4", "emoji_text_t4"])
def test_the_configs_of_a_distillation_can_run_and_are_of_a_preset(name):
    path = CONFIGS / f"{name}.yaml"
    teacher, config, _ = cli.read_distillation(["--config", str(path)], "hsivi distil", "")
    written = {ALIASES.get(key, key): value for key, value in yaml.safe_load(path.read_text()).items()}
    assert config.preset == ("latent" if config.prompts else "fast")
    counts = written.pop("num_inference_steps")
    assert config.depths == (counts if isinstance(counts, list) else [counts])
    if "guidance_scale" in written:
        assert config.scales == [written.pop("guidance_scale")]
    assert differences(flatten([teacher, config]), written) == ""


def test_no_config_is_left_untested():
    """Those of published teachers are tested in test_recipes.py, those of studies in test_study.py."""
    recipes = {f"{name}.yaml" for name in ("cifar10", "celeba64", "imagenet64", "church256")}
    recipes |= {path.name for path in CONFIGS.glob("study_*.yaml")}
    assert {path.name for path in CONFIGS.glob("*.yaml")} - recipes == {
        *[f"digits_{part}.yaml" for part in ("t5", "t1248", "evaluation", "teacher", "guided_teacher", "flow_teacher")],
        *[
            f"{kind}_{name}.yaml"
            for name in ("digits", "guided", "flow", "text", *SETS)
            for kind in ("solvers", "benchmark")
        ],
        *[f"{name}_{part}.yaml" for name in SETS for part in ("teacher", "classifier", "t4")],
        *[f"emoji_{part}.yaml" for part in ("vae", "text", "text_t4", "scorer", "lcm")],
        *[f"{name}_{method}.yaml" for name in ("digits", *SETS) for method in BASELINES],
    }


# ----- help and errors -----


def ask_for_help(capsys, call):
    with pytest.raises(SystemExit) as exit:
        call()
    assert exit.value.code == 0
    return capsys.readouterr().out


def options_in(text):
    return set(re.findall(r"^  --(\w+)", text, re.MULTILINE))


def test_help_shows_the_common_options_with_the_values_that_hold_and_help_all_every_one(parse, capsys):
    short = ask_for_help(capsys, lambda: parse("rate: 0.5", "--help", "--widths", "5", "6"))
    assert short.startswith("usage: quiz ")
    assert "a number (default: 0.5)" in short
    assert "a list (default: 5 6)" in short
    every = options_in(ask_for_help(capsys, lambda: parse(None, "--help_all")))
    named = {each.name for group in (Method, Training) for each in fields(group)}
    assert every - {"help", "help_all", "config"} == named
    assert every - options_in(short) == {"start", "keep"}


def test_an_error_of_a_command_is_one_line_with_its_notes_below(capsys):
    def fail():
        error = ValueError("two\nlines")
        error.add_note("and a note")
        raise error

    with pytest.raises(SystemExit) as exit:
        run_command(fail)
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: two lines\nand a note\n"
    with pytest.raises(ValueError, match="two"):
        run_command(fail, traceback=True)


def test_an_error_of_the_program_itself_is_left_as_it_is():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["distil", "--output_dir", "x"], "--pretrained_teacher_model is missing"),
        (["distil", "--pretrained_teacher_model", "./nowhere", "--output_dir", "x"], "teacher './nowhere' is not a f"),
        (["plan", "--num_inference_steps", "0"], "num_inference_steps=[0]: give one number of steps of at least 1"),
        (["plan", "--bogus"], "unrecognized arguments: --bogus (see `hsivi plan --help`)"),
        (["plan", "--num_inference_stpes=2"], "did you mean --num_inference_steps? (see `hsivi plan --help`)"),
        (["plan", "--num_steps=2"], "did you mean --num_inference_steps? (see `hsivi plan --help`)"),
        (
            ["distill"],
            "unknown command 'distill': choose one of distil, plan, sample, evaluate, push, demo; did you mean",
        ),
        (["distil", "--output_dir=x", "--resume_from_checkpoint=latest"], "--output_dir x holds no run to resume"),
        (["sample", "--output_dir", "x"], "--pipeline is missing"),
        (["push", "--hub_model_id", "a/b"], "--run_dir is missing"),
        (["evaluate", "--run_dir", "nowhere"], "nowhere"),
        (["bogus"], "unknown command 'bogus': choose one of distil, plan, sample, evaluate, push"),
    ],
)
def test_bad_input_of_a_command_is_one_line_and_exit_status_2(capsys, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        cli.main(args)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert os.listdir() == []


def test_the_version_is_told_and_ctrl_c_is_one_line(capsys, monkeypatch):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"hsivi-diffusers {hsivi_diffusers.__version__}\n"

    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "evaluate", interrupt)
    with pytest.raises(SystemExit, match="error: interrupted"):
        cli.main(["evaluate"])


def test_traceback_shows_where_an_error_came_from(tmp_path):
    with pytest.raises(ValueError, match="--pretrained_teacher_model is missing"):
        cli.main(["distil", "--traceback", f"--output_dir={tmp_path / 'run'}"])


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_tells_its_options(capsys, command):
    text = ask_for_help(capsys, lambda: cli.main([command, "--help"]))
    assert text.startswith(f"usage: hsivi {command} ")


def test_the_help_of_a_distillation_has_the_defaults_of_the_preset_that_is_named(capsys):
    def ask(*args):
        return " ".join(ask_for_help(capsys, lambda: cli.main(["distil", *args])).split())

    fast, paper, one = ask("--help"), ask("--help", "--preset", "paper"), ask("--help", "--num_inference_steps=1")
    assert "Adam learning rate of the critic (default: 0.001)" in fast
    assert "Adam learning rate of the critic (default: 0.0001)" in paper
    assert "Adam learning rate of the critic (default: 0.0005)" in one
    every = ask("--help_all", "--preset", "paper")
    assert "critic updates per student update (default: 20)" in every
    assert "critic updates per student update" not in paper


def test_the_help_of_a_distillation_is_shorter_than_all_its_options(capsys):
    common, every = (
        options_in(ask_for_help(capsys, lambda word=word: cli.main(["distil", word])))
        for word in ("--help", "--help_all")
    )
    assert common < every
    assert len(common) <= 35
    assert {each.name for each in fields(HSIVIConfig)} < every


def test_the_module_is_the_command(capsys, monkeypatch):
    """As `python -m hsivi_diffusers` runs it."""
    monkeypatch.setattr(sys, "argv", ["hsivi_diffusers", "--help"])
    runpy.run_module("hsivi_diffusers", run_name="__main__")
    assert capsys.readouterr().out == cli.USAGE


# ----- the config -----


def test_a_config_has_at_most_49_fields_and_each_is_used():
    """By the code outside of its own file, or by what the file computes for others."""
    names = [each.name for each in fields(HSIVIConfig)]
    assert len(names) <= 49
    package = Path(hsivi_diffusers.__file__).parent
    code = "\n".join(path.read_text() for path in package.rglob("*.py") if path.name != "config.py")
    code += (package / "distillation" / "config.py").read_text().split("def __post_init__")[1].split("def check")[0]
    unused = [name for name in names if not re.search(rf"(config|self)\.{name}\b", code)]
    assert unused == []


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


def test_old_names_are_read_on_the_command_line_in_yaml_and_in_the_record_of_a_run(tmp_path, make_config):
    (tmp_path / "old.yaml").write_text("num_layers: [1, 4]\node_pairs: 9\nclip_pictures: false\n")
    config = make_config("--ode_steps=3", "--layer_weight", "sigma2", f"--config={tmp_path / 'old.yaml'}")
    assert config.depths == [2]  # of the fixture's command line, which wins
    assert (config.num_pairs, config.pair_steps, config.loss_weight, config.clip_images) == (9, 3, "sigma2", False)
    assert set(ALIASES.values()) <= config.settings().keys()
    assert not ALIASES.keys() & config.settings().keys()


def test_the_record_of_an_older_run_is_read_as_one_of_today(tmp_path):
    """It has old names, a plain number, options that are gone, and the preset of one step as it was."""
    record = tmp_path / "options.json"
    old = {"revision": None, "num_layers": 1, "preset": "fast", "ode_steps": 4, "seed": 3, "alpha": 0.5}
    record.write_text(json.dumps({**old, **GONE}))
    settings = read_settings(record)
    today = HSIVIConfig(num_inference_steps=1, pair_steps=4, seed=3).settings()
    assert settings == {"revision": None, "alpha": 0.5, **today}
    assert (settings["num_inference_steps"], settings["preset"], settings["adam_beta1"]) == ([1], "one_call", 0.0)


def test_settings_that_had_no_effect_are_left_out_of_a_record(tmp_path):
    """They were accepted once, and are refused now: the run could be continued neither with them nor without."""
    record = tmp_path / "options.json"
    today = HSIVIConfig(guidance_scale=3.0, start_timestep=440)
    record.write_text(json.dumps({**today.settings(), "negative_prompt": "blurry", "start_signal": 3.2}))
    assert read_settings(record) == today.settings()
    HSIVIConfig(**read_settings(record)).check()
