import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml

from hsivi_diffusers.distillation import config as recipe
from hsivi_diffusers.distillation.checkpoints import Output
from hsivi_diffusers.evaluation import evaluate
from hsivi_diffusers.folders import claim_output_dir, in_turn, sole_writer
from hsivi_diffusers.options import changes, option, parse_options
from training.benchmarks.images import benchmark, train_classifier, train_consistency, train_teacher

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
SETS = ("fashion", "emoji")
ONE_CALL = {**recipe.PRESETS["fast"], **recipe.ONE_CALL}
PRESETS = {"quick": {"rate": 0.1, "steps": 10, "start": 7}, "slow": {"rate": 0.2, "steps": 20}}


@dataclass
class Method:
    _argument_group_name = "method"
    preset: Literal["quick", "slow"] = option("quick", "recipe")
    kernel: Literal["ddim", "renoise"] = option("ddim", "kernel")
    start: int | None = option(None, "may be left out")


@dataclass
class Training:
    _argument_group_name = "training"
    rate: float = option(1.0, "a number")
    steps: int = option(1, "a count")
    name: str = option("plain", "a text")
    keep: bool = option(False, "a switch")
    widths: list[int] = option([3, 4], "a list")


@pytest.fixture
def parse(tmp_path):
    """Parses a YAML text and a command line into one dictionary."""

    def run(text=None, *args, presets=PRESETS):
        config = []
        if text is not None:
            path = tmp_path / "options.yaml"
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
            config = ["--config", str(path)]
        groups = parse_options([Method, Training], "About.", presets, [*config, *args])
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


def test_defaults_are_those_of_the_dataclass_without_presets(parse):
    assert parse(None, presets=None) == {
        "preset": "quick",
        "kernel": "ddim",
        "start": None,
        "rate": 1.0,
        "steps": 1,
        "name": "plain",
        "keep": False,
        "widths": [3, 4],
    }


def test_a_list_is_not_shared_between_two_calls(parse):
    parse(None)["widths"].append(5)
    assert parse(None)["widths"] == [3, 4]


def test_the_first_preset_is_the_default(parse):
    options = parse(None)
    assert (options["preset"], options["rate"], options["steps"]) == ("quick", 0.1, 10)


@pytest.mark.parametrize(
    ("text", "args", "wanted"),
    [
        ("name: x", [], (0.1, 10)),
        ("rate: 0.5", [], (0.5, 10)),
        ("rate: 0.5", ["--rate", "0.7"], (0.7, 10)),
        ("preset: slow", [], (0.2, 20)),
        ("preset: slow", ["--preset", "quick"], (0.1, 10)),
        ("preset: slow\nrate: 0.5", ["--preset=quick"], (0.5, 10)),
        ("preset: quick\nrate: 0.5", ["--preset", "slow", "--steps", "3"], (0.5, 3)),
    ],
)
def test_the_command_line_wins_over_yaml_and_yaml_over_the_preset(parse, text, args, wanted):
    options = parse(text, *args)
    assert (options["rate"], options["steps"]) == wanted


def test_without_args_the_command_line_of_the_program_is_read(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", "--rate", "0.25"])
    assert parse_options([Method, Training], "About.", PRESETS)[1].rate == 0.25


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
        ("kernel: renoise", "kernel", "renoise"),
    ],
)
def test_yaml_values_have_the_type_of_the_option(parse, text, key, value):
    found = parse(text)[key]
    assert found == value
    assert type(found) is type(value)


def test_null_is_the_default_of_the_dataclass_and_overrides_the_preset(parse):
    assert parse(None)["start"] == 7
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


@pytest.mark.parametrize(("text", "args"), [("preset: sloow", []), ("preset: slow", ["--preset", "sloow"])])
def test_an_unknown_preset_is_named_with_the_choices(refused, text, args):
    message = refused(text, *args)
    assert "'sloow'" in message
    assert "quick, slow" in message


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
        ("kernel: foo", "--kernel", "'foo'"),
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


@pytest.mark.parametrize(
    ("config", "groups", "presets"),
    [
        *[(name, recipe.GROUPS, {"fast": ONE_CALL}) for name in ("fashion_t1.yaml", "emoji_t1.yaml")],
        *[
            (name, recipe.GROUPS, recipe.PRESETS)
            for name in ("digits_t1.yaml", "digits_t5.yaml", "digits_t1248.yaml", "fashion_t4.yaml")
        ],
        *[(name, recipe.GROUPS, recipe.PRESETS) for name in ("emoji_t2.yaml", "emoji_t4.yaml")],
        *[
            (name, [train_teacher.Data, train_teacher.Network, train_teacher.Training, Output], None)
            for name in ("digits_teacher.yaml", "fashion_teacher.yaml", "emoji_teacher.yaml")
        ],
        ("digits_evaluation.yaml", [evaluate.Evaluation], None),
        *[
            (
                name,
                [
                    train_consistency.Teacher,
                    train_consistency.Training,
                    Output,
                ],
                None,
            )
            for name in ("digits_lcm.yaml", "fashion_lcm.yaml", "emoji_lcm.yaml")
        ],
        ("fashion_classifier.yaml", [train_classifier.Training], None),
        ("emoji_classifier.yaml", [train_classifier.Training], None),
        *[
            (name, [benchmark.Parts, benchmark.Sampling, benchmark.Folders], None)
            for name in ("benchmark_digits.yaml", "benchmark_fashion.yaml", "benchmark_emoji.yaml")
        ],
    ],
)
def test_the_configs_parse_for_their_scripts(config, groups, presets):
    parsed = parse_options(groups, "", presets, ["--config", str(CONFIGS / config)])
    options = {key: value for group in parsed for key, value in vars(group).items()}
    written = yaml.safe_load((CONFIGS / config).read_text())
    assert changes(written, {key: options[key] for key in written}) == ""
    if presets:
        preset = {key: value for key, value in presets[written["preset"]].items() if key not in written}
        assert {key: options[key] for key in preset} == preset


def test_no_config_is_left_untested():
    """Those that end in a preset are tested in test_teachers.py, those of studies in test_study.py."""
    recipes = {path.name for preset in recipe.PRESETS for path in CONFIGS.glob(f"*_{preset}.yaml")}
    recipes |= {path.name for path in CONFIGS.glob("study_*.yaml")}
    assert {path.name for path in CONFIGS.glob("*.yaml")} - recipes == {
        *[f"digits_{part}.yaml" for part in ("t1", "t5", "t1248", "evaluation", "teacher", "lcm")],
        *[f"{name}_{part}.yaml" for name in SETS for part in ("teacher", "classifier", "t1", "t4", "lcm")],
        *[f"benchmark_{name}.yaml" for name in ("digits", *SETS)],
        "emoji_t2.yaml",
    }


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (5, [5], ""),
        ([5], [5], ""),
        (5, [6], "n: 5 -> [6]"),
        (5, [5, 6], "n: 5 -> [5, 6]"),
        ([5, 6], [5], "n: [5, 6] -> [5]"),
        (None, [5], "n: None -> [5]"),
        (None, [], "n: None -> []"),
    ],
)
def test_a_number_is_the_list_of_it_and_nothing_else(before, now, said):
    assert changes({"n": before, "m": 1}, {"n": now}) == said


def test_a_new_output_folder_is_made_with_its_parents(tmp_path):
    path = claim_output_dir(str(tmp_path / "a" / "b"), keep=False)
    assert path == tmp_path / "a" / "b"
    assert path.is_dir()
    assert claim_output_dir(str(path), keep=False) == path


def test_a_filled_output_folder_is_refused_unless_it_may_be_kept(tmp_path):
    (tmp_path / "precious").touch()
    with pytest.raises(ValueError, match="is not empty.*--overwrite_output_dir"):
        claim_output_dir(str(tmp_path), keep=False)
    assert claim_output_dir(str(tmp_path), keep=True) == tmp_path
    assert os.listdir(tmp_path) == ["precious"]


@pytest.mark.parametrize("keep", [False, True])
def test_a_file_or_no_name_is_no_output_folder(tmp_path, keep):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        claim_output_dir(str(tmp_path / "file"), keep)
    with pytest.raises(ValueError, match="--output_dir is missing"):
        claim_output_dir(None, keep)


def test_a_folder_has_one_writer(tmp_path):
    first = sole_writer(tmp_path)
    with first, pytest.raises(ValueError, match="is being written by another run"), sole_writer(tmp_path):
        pass
    with sole_writer(tmp_path):
        pass


def test_processes_write_in_turn(tmp_path):
    """A lock is of the handle, and each has its own, so threads wait as processes do."""
    there, leave, order = threading.Event(), threading.Event(), []

    def first():
        with in_turn(tmp_path):
            there.set()
            leave.wait(10)
            order.append("first")

    def second():
        with in_turn(tmp_path):
            order.append("second")

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(first)]
        there.wait(10)
        running.append(pool.submit(second))
        assert not running[1].done()
        leave.set()
        for each in running:
            each.result(10)
    assert order == ["first", "second"]


def test_help_lists_what_each_preset_has_instead_of_the_defaults(parse, capsys):
    with pytest.raises(SystemExit):
        parse(None, "--help")
    end = capsys.readouterr().out.splitlines()[-4:]
    assert end == [
        "--preset quick sets:",
        "  --rate=0.1 --steps=10 --start=7",
        "--preset slow sets:",
        "  --rate=0.2 --steps=20",
    ]
