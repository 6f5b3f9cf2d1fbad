"""The tests."""

from . import measuring as measuring
