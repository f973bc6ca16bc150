"""The harness that runs csrc/cuda/*.cu on the CPU (tests/host_cuda): what it finds wrong; races, barrier by barrier."""

import ctypes

import numpy as np
import pytest
from host_cuda import harness


@pytest.fixture(scope="module")
def broken():
    """Runs the named kernel, one with a known fault, on an int32 array."""
    return harness.caller(harness.load("library.cpp", {"sl_broken": [ctypes.c_char_p, harness.POINTER]}))


@pytest.mark.parametrize(
    "name, says",
    [
        ("divergent_shuffle", "a kernel hangs: 32 of 64 threads wait"),
        ("mixed_collectives", "lanes of one warp met different collectives"),
        ("half_a_barrier", "a kernel hangs: 32 of 64 threads wait"),
        ("partial_mask", "a partial lane mask"),
    ],
)
def test_harness_reports_what_is_undefined_on_a_gpu(broken, name, says):
    with pytest.raises(RuntimeError, match=says):
        broken("sl_broken", name.encode(), np.zeros(64, dtype=np.int32))
    out = np.zeros(64, dtype=np.int32)  # and goes on afterwards
    broken("sl_broken", b"with_barrier", out)
    assert out.tolist() == [(i + 1) % 64 for i in range(64)]


def test_harness_shared_memory_starts_as_garbage(broken):
    out = np.zeros(64, dtype=np.int32)
    broken("sl_broken", b"reads_shared_unwritten", out)
    assert (out == -1515870811).all()  # 0xa5a5a5a5


def test_harness_sees_a_missing_barrier(broken):
    out = np.zeros(64, dtype=np.int32)
    broken("sl_broken", b"without_barrier", out)
    assert out.tolist() != [(i + 1) % 64 for i in range(64)]


# ---- ThreadSanitizer: one host thread per CUDA thread ----

# Orders what the blocks of a grid write before the ticket that tells them apart; here blocks run one after another.
BETWEEN_BLOCKS = "what this block wrote, before its ticket"
# Each has a race check of its own, where its barriers are taken out: test_host_cuda_decode.py and so on.
ELSEWHERE = {"decode_linear.cu", "sparse_linear.cu", "sparse_linear_half.cu", "tensor_core.cuh"}


def barriers():
    names = (path.name for path in sorted(harness.CUDA_SOURCES.glob("*.cu*")) if path.name not in ELSEWHERE)
    for site in harness.barriers(*names):
        name, number = site.split(":")
        if BETWEEN_BLOCKS not in (harness.CUDA_SOURCES / name).read_text().splitlines()[int(number) - 1]:
            yield site


@pytest.fixture(scope="module")
def race_check():
    return harness.race_check("race_check.cpp", "-DSL_SAMPLE_ABOVE=512")


def test_no_races(race_check):
    status, output = race_check()
    assert status == 0, output


@pytest.mark.parametrize("site", list(barriers()))
def test_every_barrier_is_needed(race_check, site):
    harness.check_is_needed(race_check, site)
