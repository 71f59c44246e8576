"""Options of the commands: dataclasses, read from a YAML file of `--config` and from the command line, which wins."""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from ..runs.options import did_you_mean


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, without the list of all options."""

    def error(self, message: str) -> NoReturn:
        words = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
        if message.startswith("unrecognized") and words:
            message += did_you_mean(words[0], self._option_string_actions)
        self.exit(2, f"error: {message} (see `{self.prog} --help`)\n")


def parse_options(
    groups: Sequence[type[Any]],
    description: str,
    args: Sequence[str] | None = None,
    prog: str | None = None,
    aliases: Mapping[str, str] | None = None,
    before: Mapping[str, Any] | None = None,
) -> tuple[Any, ...]:
    """Reads one dataclass per group of options, and returns an instance of each.

    A value on the command line wins over the YAML file of `--config`, which wins over the settings `before`, and these
    over the default of the dataclass. A bad option ends the program with one line and exit status 2. `_group` of a
    dataclass is its heading in `--help`; `aliases` are old names of options, which are still read.
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
    hints: dict[str, Any] = {}
    for group in groups:
        heading, kinds = parser.add_argument_group(group._group), get_type_hints(group)
        for each in (each for each in fields(group) if each.metadata):
            hints[each.name] = kinds[each.name]
            heading.add_argument(f"--{each.name}", help=each.metadata["help"], **_keywords(hints[each.name]))
    words = [_renamed(word, aliases or {}) for word in (sys.argv[1:] if args is None else args)]
    given = vars(parser.parse_args(words))
    path = given.pop("config", None)
    settings = {} if path is None else _read_config(parser, path, hints, aliases or {})
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


def _renamed(word: str, aliases: Mapping[str, str]) -> str:
    """An option of the command line under its name of today."""
    name, equals, value = word.removeprefix("--").partition("=")
    return f"--{aliases[name]}{equals}{value}" if word.startswith("--") and name in aliases else word


def _read_config(parser: Parser, path: str, hints: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """The settings of a YAML file, checked and converted as those of the command line; `1e-4` is text for YAML."""
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"--config {path} cannot be read: {' '.join(str(error).split())}")
    if not isinstance(settings, dict):
        parser.error(f"--config {path} must hold lines of `option: value`, got {type(settings).__name__}")
    words: list[str] = []
    empty: dict[str, Any] = {}
    for key, value in settings.items():
        name = aliases.get(str(key), str(key))
        if name not in hints:
            parser.error(f"{path}: unknown option `{name}`{did_you_mean(name, hints, '`')}")
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            no = value is False and "no" in _keywords(hints[name]).get("choices", ())  # YAML's `no` is false
            words.append(f"--{name}={'no' if no else value}")
        elif type(None) in get_args(hints[name]):
            empty[name] = None
    return {**empty, **vars(parser.parse_args(words))}


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


def run_command(command: Callable[[], Any], traceback: bool = False) -> None:
    """Runs a command: an error that its user can mend is one line with its notes below, and exit status 2."""
    try:
        command()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if traceback:
            raise
        text = " ".join(str(error).split())
        if isinstance(error, ModuleNotFoundError):
            text += ": pip install 'hsivi-diffusers[train]'"
        sys.exit(print_error("\n".join([text, *getattr(error, "__notes__", [])])))


def print_error(text: str) -> int:
    """Prints one line of an error; returns the exit status of it."""
    print(f"error: {text}", file=sys.stderr)
    return 2
