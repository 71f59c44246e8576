"""The options of the commands, from YAML and the command line, and what a user reads of an error."""

import json
import re
import sys
from dataclasses import dataclass, fields
from typing import Literal

import pytest
import torch

from hsivi_diffusers.commands.options import Parser, check_numbers, parse_options, run_command, with_dashes
from hsivi_diffusers.runs.options import option


@dataclass
class Method:
    _group = "method"
    law: Literal["normal", "uniform", "no"] = option("normal", "a choice")
    start: int | None = option(7, "may be left out", common=False)
    prompts: str | list[str] | None = option(None, "a file, or a list")


@dataclass
class Training:
    _group = "training"
    rate: float = option(1.0, "a number")
    steps: int = option(1, "a count")
    name: str = option("plain", "a text")
    keep: bool = option(False, "a switch", common=False)
    widths: list[int] = option([3, 4], "a list")
    counts: int | list[int] = option(2, "one or several")
    words: list[str] = option([], "some texts")


@pytest.fixture
def parse(tmp_path):
    """Parses a YAML text and a command line into one dictionary."""

    def run(text=None, *args):
        config = []
        if text is not None:
            path = tmp_path / "options.yaml"
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
            config = ["--config", str(path)]
        groups = parse_options([Method, Training], "About.", [*config, *args], "quiz")
        assert [type(group) for group in groups] == [Method, Training]
        return {**vars(groups[0]), **vars(groups[1])}

    return run


def test_defaults_are_those_of_the_dataclasses_and_lists_are_not_shared(parse):
    wanted = {"law": "normal", "start": 7, "prompts": None, "rate": 1.0, "steps": 1, "name": "plain", "keep": False}
    wanted |= {"widths": [3, 4], "counts": 2, "words": []}
    found = parse()
    assert found == wanted
    found["widths"].append(5)
    assert parse() == wanted


def test_the_command_line_wins_over_a_file_and_this_over_settings_of_before(tmp_path, monkeypatch):
    path = tmp_path / "options.yaml"
    path.write_text("rate: 0.5\nname: x")
    words, before = ["--config", str(path), "--steps=7", "--name", "y"], {"rate": 0.1, "steps": 9, "keep": True, "a": 1}
    (options,) = parse_options([Training], "About.", words, "quiz", before)
    assert (options.rate, options.steps, options.keep, options.name) == (0.5, 7, True, "y")
    monkeypatch.setattr(sys, "argv", ["script", "--rate", "0.25"])  # which is read without words
    assert parse_options([Method, Training], "About.")[1].rate == 0.25


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("rate: 1e-4", "rate", 1e-4),
        ("rate: 3", "rate", 3.0),
        ("rate: -1e-4", "rate", -1e-4),
        ("rate: null", "rate", 1.0),
        ("start: 5", "start", 5),
        ("start: null", "start", None),
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
        ("prompts: cats.txt", "prompts", "cats.txt"),
        ("prompts: [a cat, --a dog]", "prompts", ["a cat", "--a dog"]),
        ("words: [a cat, --a dog]", "words", ["a cat", "--a dog"]),
        (b"\xef\xbb\xbfsteps: 12", "steps", 12),
    ],
)
def test_yaml_values_have_the_type_of_the_option(parse, text, key, value):
    found = parse(text)[key]
    assert found == value
    assert type(found) is type(value)


def test_lists_and_switches_on_the_command_line(parse):
    options = parse("widths: [1, 2, 3]", "--widths", "5", "6", "--keep")
    assert (options["widths"], options["keep"]) == ([5, 6], True)


@pytest.mark.parametrize(
    ("text", "args", "message"),
    [
        ("stepz: 3", [], r"options.yaml: unknown option `stepz`; did you mean `steps`\?"),
        ("qqqqqq: 3", [], "unknown option `qqqqqq`"),
        ("a: [1", [], "options.yaml cannot be read: "),
        (b"name: \xff\xfe", [], "options.yaml cannot be read: "),
        ("rate: 0.1\nsteps: 2\nrate: 0.5", [], "options.yaml cannot be read: `rate` is given twice, again in line 3"),
        ("", [], "options.yaml must hold lines of `option: value`, got NoneType"),
        ("- rate", [], "options.yaml must hold lines of `option: value`, got list"),
        ("steps: [1, 2]", [], "options.yaml: `steps` takes one value, got a list"),
        ("name: {a: b}", [], "options.yaml: `name` takes one value, got a dict"),
        ("prompts: [a cat, 7]", [], "options.yaml: `prompts` is a list of texts: put 7 in quotes"),
        (None, ["--config", "nowhere.yaml"], "--config nowhere.yaml cannot be read: "),
        ("law: foo", [], r"argument --law: invalid choice: 'foo' \(choose from "),
        ("rate: fast", [], "argument --rate: 'fast': give a number "),
        ("steps: 1.5", [], "argument --steps: '1.5': give a whole number "),
        ("widths: [1, x]", [], "argument --widths: 'x': give whole numbers with spaces between "),
        (None, ["--widths", "16x24"], "argument --widths: '16x24': give whole numbers with spaces between "),
        (None, ["--law", "foo"], r"argument --law: invalid choice: 'foo' \(choose from "),
        (None, ["--keep", "perhaps"], "'perhaps' is not true or false"),
        (None, ["--bogus", "1"], "unrecognized arguments: --bogus 1"),
        (None, ["--step", "1"], r"unrecognized arguments: --step 1; did you mean --steps\?"),
        (None, ["--step", "1", "--rat=2"], r".*; did you mean --steps\?; did you mean --rate\?"),
        (None, ["stray"], "unrecognized arguments: stray"),
    ],
)
def test_what_cannot_be_read_is_one_line_that_names_the_program(parse, capsys, text, args, message):
    with pytest.raises(SystemExit) as exit:
        parse(text, *args)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"error: .*{message}", line)
    assert line.endswith("(see `quiz --help`)")


def test_help_shows_the_common_options_with_the_values_that_hold_and_help_all_every_one(parse, capsys):
    def ask(*given):
        with pytest.raises(SystemExit) as exit:
            parse(*given)
        assert exit.value.code == 0
        return capsys.readouterr().out

    def options_in(text):
        return set(re.findall(r"^  --(\w+)", text, re.MULTILINE))

    short = ask("rate: 0.5", "--help", "--widths", "5", "6")
    assert short.startswith("usage: quiz ")
    assert "a number (default: 0.5)" in short
    assert "a list (default: 5 6)" in short
    every = options_in(ask(None, "--help_all"))
    named = {each.name for group in (Method, Training) for each in fields(group)}
    assert every - {"help", "help_all", "config", "traceback"} == named
    assert every - options_in(short) == {"start", "keep"}


# ----- errors of a command -----


def fail(error, *args):
    """Makes a command that reads its options and fails."""

    def command():
        parse_options([Method, Training], "", args)
        raise error

    return command


def missing(name):
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


def refuse():
    """A command whose option the package refuses, with a note."""
    parse_options([Training], "", [])
    try:
        check_numbers(Training(steps=3), steps=(5, 9))
    except ValueError as error:
        error.add_note("or widths=5")
        raise


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (refuse, "--steps=3: give a whole number from 5 to 9\nor --widths=5\n"),
        (fail(missing("peft.tuners")), "the module peft is missing: pip install 'hsivi-diffusers[train]'\n"),
        (fail(missing("gradio")), "the module gradio is missing: pip install 'hsivi-diffusers[demo]'\n"),
        (fail(missing("wandb")), "the module wandb is missing: install the package that provides it\n"),
        (fail(MemoryError("5 TB")), "out of memory (5 TB): give smaller sizes, first of all of a batch\n"),
        (lambda: torch.zeros(2**60, 3), "out of memory (Storage size calculation overflowed"),
        (lambda: torch.zeros(2**40, 3), "out of memory ("),
        (lambda: json.loads("{x"), "JSONDecodeError: Expecting property name"),
    ],
)
def test_an_error_that_a_user_can_mend_is_one_line(capsys, command, message):
    with pytest.raises(SystemExit) as exit:
        run_command(command)
    assert exit.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith(f"error: {message}")
    assert text.endswith(" (--traceback shows where it comes from)\n") == ("JSON" in message)


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (lambda: 1 / 0, ZeroDivisionError),
        (lambda: torch.zeros(2).reshape(3), RuntimeError),
        (fail(missing("hsivi_diffusers.gone")), ModuleNotFoundError),
        (fail(ValueError("two"), "--traceback"), ValueError),
    ],
)
def test_a_bug_and_what_a_traceback_was_asked_for_are_left_as_they_are(command, kind):
    with pytest.raises(kind):
        run_command(command)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("output_dir is missing: name a folder", "--output_dir is missing: name a folder"),
        ("--output_dir is missing", "--output_dir is missing"),
        ("output_dir='a/output_dir' is not empty", "--output_dir='a/output_dir' is not empty"),
        ("pass output_dir='x', or --output_dir y", "pass --output_dir='x', or --output_dir y"),
        ("seed=-1: give a seed of at least 0", "--seed=-1: give a seed of at least 0"),
        ("prompts is missing: give prompts", "--prompts is missing: give prompts"),
        ("the prompts=7 are prompts", "the --prompts=7 are prompts"),
        ("HSIVIConfig(output_dir='x') or HSIVIConfig(seed=3)", "HSIVIConfig(output_dir='x') or HSIVIConfig(seed=3)"),
        ("`output_dir` of output_dirs, my_output_dir, output_dir.json", None),
        ("/tmp/seed=3/prompts, config.seed=3", None),
    ],
)
def test_options_in_a_message_have_their_dashes_once(monkeypatch, text, shown):
    monkeypatch.setattr(Parser, "options", frozenset({"output_dir", "seed", "prompts", "dir"}))
    assert with_dashes(text) == (shown or text)
    assert with_dashes(with_dashes(text)) == with_dashes(text)


@pytest.mark.parametrize("value", [0, 11, [3, 0], -(10**30)])
def test_a_number_out_of_bounds_is_refused(value):
    check_numbers(Training(steps=1, widths=[10], name=None), steps=(1, 10), widths=(1, 10), name=(1, 10))
    with pytest.raises(ValueError, match=r"steps=.*: give a whole number from 1 to 10$"):
        check_numbers(Training(steps=value), steps=(1, 10))
