"""Options of the scripts: preset, then YAML file, then command line, each overriding the one before."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the description, and tells the defaults."""


def option(default: Any, help: str) -> Any:
    """A field of an options dataclass, with the text of `--help`."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def parse_options(
    groups: Sequence[Any],
    description: str,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    args: Sequence[str] | None = None,
) -> tuple[Any, ...]:
    """Reads one dataclass per group of options.

    A value on the command line wins over the YAML file of `--config`, which wins over the `--preset`, which wins
    over the default written in the dataclass. Bad options end the program with a message and exit status 2.

    Args:
        groups: Dataclasses; `_argument_group_name` of each is its heading in `--help`.
        description: First lines of `--help`.
        presets: Settings by name of preset; the first one is the default. A group then has the field `preset`.
        args: Arguments, `sys.argv[1:]` by default.

    Returns:
        One instance of each dataclass, in the order given.
    """
    parser = HfArgumentParser(
        list(groups),
        description=description,
        epilog=_describe(presets or {}),
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file of options; the command line overrides it")
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    early.add_argument("--preset")
    given, _ = early.parse_known_args(args)

    settings = _read_yaml(parser, given.config) if given.config else {}
    known = {field.name for group in groups for field in fields(group)}
    _refuse_unknown_keys(parser, settings, known, given.config)
    if presets:
        preset = given.preset or settings.get("preset") or next(iter(presets))
        if preset not in presets:
            parser.error(f"--preset {preset!r} is unknown: choose one of {', '.join(presets)}")
        settings = {**presets[preset], **settings, "preset": preset}
    parser.set_defaults(**{key: value for key, value in settings.items() if value == []})
    *chosen, _, unknown = parser.parse_args_into_dataclasses(
        [*_as_arguments(settings), *(sys.argv[1:] if args is None else args)], return_remaining_strings=True
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return tuple(chosen)


def _describe(presets: Mapping[str, Mapping[str, Any]]) -> str:
    """The last lines of `--help`: what a preset has in the place of the defaults above them."""
    lines = []
    for name, settings in presets.items():
        lines.append(f"--preset {name} sets:")
        lines += textwrap.wrap(" ".join(_as_arguments(settings)), initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines)


def _as_arguments(settings: Mapping[str, Any]) -> list[str]:
    """The settings as a command line, so that argparse converts and checks them: `1e-4` is text for YAML."""
    arguments = []
    for key, value in settings.items():
        if isinstance(value, list):
            arguments += [f"--{key}", *map(str, value)] if value else []
        elif value is not None:
            arguments.append(f"--{key}={value}")
    return arguments


def _read_yaml(parser: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"--config {path} cannot be read: {error}")
    if not isinstance(settings, dict):
        parser.error(f"--config {path} must hold lines of `option: value`, got {type(settings).__name__}")
    return settings


def _refuse_unknown_keys(
    parser: argparse.ArgumentParser, settings: Mapping[str, Any], known: set[str], path: str | None
) -> None:
    for key in settings:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean `{close[0]}`?" if close else "`--help` lists the options."
            parser.error(f"{path}: unknown option `{key}`; {hint}")


def flatten(groups: Sequence[Any]) -> dict[str, Any]:
    """The options of several groups, by name."""
    return {name: value for group in groups for name, value in asdict(group).items()}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Says which of the options now are others than before; nothing if none is.

    A number is the list of it: an option that takes several may have taken one.
    """
    return "; ".join(
        f"{key}: {before.get(key)} -> {now[key]}" for key in now if before.get(key) not in (now[key], _alone(now[key]))
    )


def changes_since(record: Path, groups: Sequence[Any]) -> str:
    """Says which options are others than in a run's options.json; those that an old one lacks count as defaults."""
    defaults = flatten([type(group)() for group in groups])
    return changes({**defaults, **json.loads(record.read_text())}, flatten(groups))


def _alone(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value
