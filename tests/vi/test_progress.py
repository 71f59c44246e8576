import io
import re
import sys

import pytest
import torch

from hsivi_diffusers.vi.fitting import Step, Update
from hsivi_diffusers.vi.progress import with_bar

NONE = Update(torch.zeros(0), torch.zeros(0))


def step(number, next_step):
    return Step(number, Update(torch.zeros(2), torch.tensor([1.0, 2.0])), NONE, next_step)


STEPS = [step(3, 4), step(4, 9), step(9, 10)]  # a stage that was stopped at step 4


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("kind", "lines"), [(Terminal, ["3", "10"]), (io.StringIO, [])])
def test_a_terminal_shows_where_a_resumed_fit_is_and_its_loss_and_a_log_file_nothing(kind, lines, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", written := kind())
    assert list(with_bar(iter(STEPS), 3, 10)) == STEPS
    shown = re.findall(r"(\d+)/10 ", written.getvalue())
    assert [*shown[:1], *shown[1:][-1:]] == lines
    assert ("loss 1.5" in written.getvalue()) == bool(lines)


def test_a_loop_that_is_left_closes_its_bar(monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", written := Terminal())
    steps = with_bar(iter(STEPS), 3, 10)
    assert next(steps) is STEPS[0]
    steps.close()
    assert written.getvalue().endswith("\n")
    assert "4/10" in written.getvalue()


def test_without_tqdm_there_is_no_bar(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    monkeypatch.setattr(sys, "stderr", written := Terminal())
    assert list(with_bar(iter(STEPS), 3, 10)) == STEPS
    assert written.getvalue() == ""
