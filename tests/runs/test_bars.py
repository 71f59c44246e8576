"""Progress bars: in a terminal as tqdm draws them, in a log file lines."""

import io

from hsivi_diffusers.runs import bars
from hsivi_diffusers.runs.bars import bar


def test_a_log_gets_lines_and_nothing_that_moves_a_cursor(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    for _ in bar(range(2), "outer"):
        for _ in bar(range(3), "inner", leave=False):
            pass
    lines = log.getvalue().split("\n")
    assert not {"\r", "\x1b"} & {*log.getvalue()}
    assert [line.split(":")[0] for line in lines[:-1]] == ["outer", "inner", "inner", "outer"]
    assert "2/2" in lines[-2]


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    log, now = io.StringIO(), iter(range(1000))
    monkeypatch.setattr("sys.stderr", log)
    monkeypatch.setattr("tqdm.std.time", lambda: next(now))
    for _ in bar(range(100), "x"):
        pass
    assert 3 <= log.getvalue().count("\n") <= 100 / bars.SECONDS * 4


def test_a_terminal_gets_a_bar_that_is_drawn_again(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    for _ in bar(range(3), "x"):
        pass
    assert "\r" in terminal.getvalue()
