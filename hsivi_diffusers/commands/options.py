"""Options of the commands: dataclasses, read from a YAML file of `--config` and from the command line, which wins."""

from __future__ import annotations

import argparse
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from traceback import walk_tb
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from ..runs.options import did_you_mean

OURS = ("hsivi_diffusers", "training", "__main__")  # packages whose messages say what to do
EXTRAS = {  # modules of the extras, which a plain installation lacks
    "evaluate": ("efficientnet_lite_pytorch", "matplotlib", "ot", "prdc", "sklearn", "torchmetrics"),
    "train": ("accelerate", "filelock", "peft", "psutil"),
    "demo": ("gradio",),
}
OUT_OF_MEMORY = "out ?of ?memory|enough memory|allocate memory|MemoryError|size calculation overflowed"


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, without the list of all options.

    Attributes:
        options: Names of the options that were read last, for messages.
        traceback: Whether the traceback of an error was asked for.
    """

    options: frozenset[str] = frozenset()
    traceback = False

    def error(self, message: str) -> NoReturn:
        words = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
        if message.startswith("unrecognized"):
            message += "".join(did_you_mean(word, self._option_string_actions) for word in words)
        if found := re.match(r"argument (\S+): invalid (int|float) value: (.*)", message):
            name, kind, value = found.groups()
            number, several = "whole number" if kind == "int" else "number", self._option_string_actions[name].nargs
            message = f"argument {name}: {value}: give {f'{number}s with spaces between' if several else f'a {number}'}"
        self.exit(2, f"error: {message} (see `{self.prog} --help`)\n")


class Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which PyYAML drops the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = list[Any]()
        for key, _ in node.value:
            keys.append(self.construct_object(key, deep=True))
            if keys[-1] in keys[:-1]:
                raise yaml.YAMLError(f"`{keys[-1]}` is given twice, again in line {key.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def parse_options(
    groups: Sequence[type[Any]],
    description: str,
    args: Sequence[str] | None = None,
    prog: str | None = None,
    before: Mapping[str, Any] | None = None,
) -> tuple[Any, ...]:
    """Reads one dataclass per group of options, and returns an instance of each.

    A value on the command line wins over the YAML file of `--config`, which wins over the settings `before`, and these
    over the default of the dataclass. A bad option ends the program with one line and exit status 2. `_group` of a
    dataclass is its heading in `--help`.
    """
    parser = Parser(
        prog=prog,
        usage="%(prog)s [OPTIONS]",
        description=description,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--config", help="YAML file of options; the command line overrides it")
    parser.add_argument("--help", "-h", action="store_true", help="show the common options")
    parser.add_argument("--help_all", action="store_true", help="show all options")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    hints: dict[str, Any] = {}
    for group in groups:
        heading, kinds = parser.add_argument_group(group._group), get_type_hints(group)
        for each in (each for each in fields(group) if each.metadata):
            hints[each.name] = kinds[each.name]
            heading.add_argument(f"--{each.name}", help=each.metadata["help"], **_keywords(hints[each.name]))
    given = vars(parser.parse_args(args))
    Parser.options, Parser.traceback = frozenset(hints), given.pop("traceback", False)
    path = given.pop("config", None)
    settings = {} if path is None else _read_config(parser, path, hints)
    given = {**{name: value for name, value in (before or {}).items() if name in hints}, **settings, **given}
    shown = [name for name in ("help", "help_all") if given.pop(name, False)]
    instances = tuple(
        group(**{each.name: given[each.name] for each in fields(group) if each.name in given}) for group in groups
    )
    if shown:
        _show_help(parser, instances, everything="help_all" in shown)
    return instances


def _keywords(hint: Any) -> dict[str, Any]:
    """How argparse reads a value of a type."""
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        lists = [kind for kind in kinds if get_origin(kind) is list]
        # Of a number or a list of them, the list; of text, the text, which names a file with the list.
        return _keywords(kinds[0] if kinds[0] is str else (lists or kinds)[0])
    if get_origin(hint) is list:
        return {"nargs": "*", **_keywords(get_args(hint)[0])}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if hint is bool:
        return {"type": _to_bool, "nargs": "?", "const": True, "metavar": "true|false"}
    return {"type": hint, "metavar": {int: "N", float: "X"}.get(hint, "TEXT")}


def _to_bool(text: str) -> bool:
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return known[text.lower()]


def _read_config(parser: Parser, path: str, hints: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a YAML file, checked and converted as those of the command line; `1e-4` is text for YAML."""
    try:
        settings = yaml.load(Path(path).read_text(encoding="utf-8-sig"), Loader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        parser.error(f"--config {path} cannot be read: {' '.join(str(error).split())}")
    if not isinstance(settings, dict):
        parser.error(f"--config {path} must hold lines of `option: value`, got {type(settings).__name__}")
    words: list[str] = []
    found: dict[str, Any] = {}  # what a command line cannot say
    for name, value in settings.items():
        if name not in hints:
            parser.error(f"{path}: unknown option `{name}`{did_you_mean(str(name), hints, '`')}")
        hint = hints[name]
        lists = [kind for kind in (hint, *get_args(hint)) if get_origin(kind) is list]
        if isinstance(value, dict) or (isinstance(value, list) and not lists):
            parser.error(f"{path}: `{name}` takes one value, got a {type(value).__name__}")
        if isinstance(value, list) and get_args(lists[0])[0] is str:
            if others := [each for each in value if not isinstance(each, str)]:
                parser.error(f"{path}: `{name}` is a list of texts: put {others[0]!r} in quotes")
            found[name] = value
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            no = value is False and "no" in _keywords(hint).get("choices", ())  # YAML's `no` is false
            words.append(f"--{name}={'no' if no else value}")
        elif type(None) in get_args(hint):
            found[name] = None
    return {**found, **vars(parser.parse_args(words))}


def _show_help(parser: Parser, instances: Sequence[Any], everything: bool) -> NoReturn:
    """Prints the options with the defaults that hold beside what was given, and ends the program."""
    values = {each.name: (each, getattr(group, each.name)) for group in instances for each in fields(group)}
    for action in parser._actions:
        if action.dest in values:
            each, value = values[action.dest]
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            if value not in (None, []):
                action.help = f"{action.help} (default: {text.lower() if isinstance(value, bool) else text})"
            action.help = str(action.help).replace("%", "%%")
            if not (everything or each.metadata.get("common")):
                action.help = argparse.SUPPRESS
    parser.print_help()
    parser.exit()


def check_numbers(options: Any, **bounds: tuple[int, int]) -> None:
    """Raises ValueError if an option, or a number of a list, is out of its bounds; None is not checked."""
    for name, (least, most) in bounds.items():
        value = getattr(options, name)
        numbers = value if isinstance(value, list) else [least if value is None else value]
        if not all(least <= number <= most for number in numbers):
            raise ValueError(f"{name}={value}: give a whole number from {least} to {most}")


def run_command(command: Callable[[], Any]) -> None:
    """Runs a command: an error that its user can mend is one line with its notes below, and exit status 2."""
    Parser.options, Parser.traceback = frozenset(), False
    try:
        command()
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        text = _one_line(error)
        if Parser.traceback or text is None:
            raise
        sys.exit(print_error("\n".join([text, *map(with_dashes, getattr(error, "__notes__", []))])))


def _one_line(error: Exception) -> str | None:
    """What the user reads of an error; None of one that is a bug."""
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and error.name:
        name = error.name.partition(".")[0]
        if name in OURS:
            return None
        extras = [extra for extra, modules in EXTRAS.items() if name in modules]
        remedy = f"pip install 'hsivi-diffusers[{extras[0]}]'" if extras else "install the package that provides it"
        return f"the module {name} is missing: {remedy}"
    if isinstance(error, MemoryError | RuntimeError):
        if not re.search(OUT_OF_MEMORY, f"{type(error).__name__} {text}", re.IGNORECASE):
            return None
        sizes = [f"--{name}" for name in sorted(Parser.options) if name.endswith("batch_size")]
        return f"out of memory ({text[:100]}): give smaller sizes, first of all {' or '.join(sizes) or 'of a batch'}"
    *_, (frame, _) = walk_tb(error.__traceback__)
    if frame.f_globals.get("__name__", "").partition(".")[0] in OURS and not isinstance(error, ImportError):
        return with_dashes(text)
    return f"{type(error).__name__}: {text} (--traceback shows where it comes from)"


def with_dashes(text: str) -> str:
    """Writes the options in a message of the package as a command takes them: `output_dir` as `--output_dir`.

    A name of one word may be a word of English: it is an option before `=` and at the start of the message.
    """
    for name in Parser.options:
        before, after = r"(?<![\w./'\"`-])(?<!\w\()", r"(?![\w/'\"`-]|\.\w)"
        if "_" not in name:
            before, after = rf"(?:^|{before}(?={name}=\S))", r"(?==| is missing| was given)"
        text = re.sub(f"{before}{name}{after}", f"--{name}", text)
    return text


def print_error(text: str) -> int:
    """Prints one line of an error; returns the exit status of it."""
    print(f"error: {text}", file=sys.stderr)
    return 2
