"""Progress bars for a terminal, a notebook and a log file."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import auto, autonotebook, std

SECONDS = 30  # from one line of a log to the next
CONTROL = re.compile(r"\x1b\[[A-Z]|[\r\n]")  # moves the cursor


class _Lines:
    """A stream that writes each state of a bar as a line."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        if line := CONTROL.sub("", text).rstrip():
            self.stream.write(f"{line}\n")

    def flush(self) -> None:
        self.stream.flush()


def bar(iterable: Iterable[Any] | None = None, desc: str | None = None, **options: Any) -> std.tqdm[Any]:
    """Returns a bar of tqdm, with its arguments; where stderr is a file, the bar prints a line every 30 seconds."""
    if sys.stderr.isatty() or autonotebook.tqdm is not std.tqdm:
        return auto.tqdm(iterable, desc, **options)
    lines: Any = _Lines(sys.stderr)
    return std.tqdm(iterable, desc, file=lines, mininterval=SECONDS, maxinterval=2 * SECONDS, **options)
