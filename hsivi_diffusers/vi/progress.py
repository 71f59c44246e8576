"""The progress bar of a fit: by tqdm where it is installed, and none where it is not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module

from .fitting import Step


def with_bar(steps: Iterable[Step], start: int, total: int) -> Iterator[Step]:
    """Yields the steps, and shows in a terminal or a notebook how many of the total are done, and the layers' loss.

    The bar starts at `start`, and jumps where a stage is stopped. Nothing is written to a log file.
    """
    try:
        tqdm = import_module("tqdm.auto")  # not a dependency: the method needs torch alone
    except ImportError:
        yield from steps
        return
    in_notebook = tqdm.notebook_tqdm.__module__ == "tqdm.notebook"
    with tqdm.tqdm(total=total, initial=start, unit="step", disable=False if in_notebook else None) as bar:
        for step in steps:
            if not bar.disable:
                bar.set_postfix_str(f"loss {float(step.layers.loss.mean()):.4g}", refresh=False)
                bar.update(step.next_step - bar.n)
            yield step
