"""The time that a benchmark counts."""

from __future__ import annotations

import time
from types import TracebackType


class Stopwatch:
    """Adds up the time spent inside `with` blocks, also of a block that raises an error.

    Attributes:
        seconds: Wall-clock.
        cpu_seconds: CPU time of this process, which other work on the machine does not change.
    """

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.seconds += time.perf_counter() - self._start[0]
        self.cpu_seconds += time.process_time() - self._start[1]
