"""The harness that runs csrc/cuda/*.cu on the CPU (tests/host_cuda): what it finds wrong; races, barrier by barrier."""

import ctypes
import importlib.util
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest


def load_builder():
    spec = importlib.util.spec_from_file_location("host_cuda_build", Path(__file__).parent / "host_cuda" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def broken():
    """Runs the named kernel, one with a known fault, on an int32 array."""
    library = ctypes.CDLL(str(load_builder().build("library.cpp", "-O2", "-shared")))
    library.sl_broken.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    library.sl_broken.restype = ctypes.c_char_p

    def call(name, out):
        message = library.sl_broken(name, out.ctypes.data)
        if message is not None:
            raise RuntimeError(message.decode())

    return call


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
        broken(name.encode(), np.zeros(64, dtype=np.int32))
    out = np.zeros(64, dtype=np.int32)  # and goes on afterwards
    broken(b"with_barrier", out)
    assert out.tolist() == [(i + 1) % 64 for i in range(64)]


def test_harness_shared_memory_starts_as_garbage(broken):
    out = np.zeros(64, dtype=np.int32)
    broken(b"reads_shared_unwritten", out)
    assert (out == -1515870811).all()  # 0xa5a5a5a5


def test_harness_sees_a_missing_barrier(broken):
    out = np.zeros(64, dtype=np.int32)
    broken(b"without_barrier", out)
    assert out.tolist() != [(i + 1) % 64 for i in range(64)]


# ---- ThreadSanitizer: one host thread per CUDA thread ----

CUDA_SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
# Orders what the blocks of a grid write before the ticket that tells them apart; here blocks run one after another.
BETWEEN_BLOCKS = "what this block wrote, before its ticket"
# Each has a race check of its own, where its barriers are taken out: test_host_cuda_decode.py and so on.
ELSEWHERE = {"decode_linear.cu", "sparse_linear.cu", "sparse_linear_half.cu"}


def barriers():
    for path in sorted(CUDA_SOURCES.glob("*.cu*")):
        if path.name in ELSEWHERE:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(r"__sync(threads|warp)\(\)", line) and BETWEEN_BLOCKS not in line:
                yield f"{path.name}:{number}"


@pytest.fixture(scope="module")
def race_check():
    """Runs the check, without one barrier if told so; returns the exit status and what was printed."""
    program = load_builder().build(
        "race_check.cpp", "-O1", "-fsanitize=thread", "-DHOST_CUDA_THREADS", "-DSL_SAMPLE_ABOVE=512"
    )

    def run(without=""):
        environment = os.environ | {"HOST_CUDA_DROP_BARRIER": without, "TSAN_OPTIONS": "halt_on_error=1:exitcode=66"}
        done = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=300, check=False)
        return done.returncode, done.stdout + done.stderr

    return run


def test_no_races(race_check):
    status, output = race_check()
    assert status == 0, output


@pytest.mark.parametrize("site", list(barriers()))
def test_every_barrier_is_needed(race_check, site):
    """Without any one of its barriers a kernel has a data race, and this harness sees it."""
    status, output = race_check(without=site)
    assert status == 66 and "data race" in output, f"{status}\n{output}"
