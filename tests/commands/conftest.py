"""The fixtures of tests/training/conftest.py."""

from training.conftest import *  # noqa: F403
