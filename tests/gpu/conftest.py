"""float32 is float32 in all of these tests; and a part of them can be run, so that several processes share them:
`pytest tests/gpu --shard 2/8`."""

import pytest

from sparselottery.bench import timing


@pytest.fixture(autouse=True)
def exact_float32():
    """Convolutions use TF32 on a GPU unless told not to, which is right to three digits only."""
    with timing.exact_float32():
        yield


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
