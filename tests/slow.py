"""Parameters of which a few are tested by default, and the others, which repeat the same behaviour, as slow tests."""

import pytest


def others_slow(values, *usual):
    """Marks those slow that are not among the usual ones; a tuple has several arguments."""
    values = [*values]
    assert {*usual} <= {*values}
    return [
        pytest.param(*(value if isinstance(value, tuple) else [value]), marks=[pytest.mark.slow] * (value not in usual))
        for value in values
    ]
