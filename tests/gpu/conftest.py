"""Runs a part of the tests, so that several processes can share them: `pytest tests/gpu --shard 2/8`."""

import pytest


def pytest_addoption(parser):
    parser.addoption("--shard", default="0/1", metavar="I/N", help="run every N-th test from the I-th on (from 0)")


def pytest_collection_modifyitems(config, items):
    asked = config.getoption("--shard", default="0/1")  # not there when the tests of a folder above are run
    try:
        part, parts = map(int, asked.split("/"))
        if not 0 <= part < parts:
            raise ValueError
    except ValueError:
        raise pytest.UsageError(f"--shard: expected I/N with 0 <= I < N, got {asked!r}") from None
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % parts != part])
    items[:] = items[part::parts]
