"""What the tests of csrc/cuda on the CPU share: kernels behind ctypes, and ThreadSanitizer's view of them."""

import ctypes
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from .build import build

CUDA_SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
BOOL, INT, I64, POINTER = ctypes.c_bool, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


def load(main: str, functions: dict[str, list], **options) -> ctypes.CDLL:
    """The shared library of `main` (options as for `build`); its functions {name: arguments} return a message or None."""
    library = ctypes.CDLL(str(build(main, "-O2", "-shared", **options)))
    for name, arguments in functions.items():
        getattr(library, name).argtypes = arguments
        getattr(library, name).restype = ctypes.c_char_p
    return library


def caller(library: ctypes.CDLL) -> Callable:
    """`call(name, *arguments)`: tensors and arrays go as addresses, a message comes as a RuntimeError."""

    def address(argument):
        if isinstance(argument, np.ndarray):
            return argument.ctypes.data
        return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument

    def call(name, *arguments):
        message = getattr(library, name)(*map(address, arguments))
        if message is not None:
            raise RuntimeError(message.decode())

    return call


def barriers(*names: str) -> Iterator[str]:
    """FILE:LINE of every barrier, and of every wait for asynchronous copies, in these files of csrc/cuda."""
    for name in names:
        for number, line in enumerate((CUDA_SOURCES / name).read_text().splitlines(), 1):
            if re.search(r"__sync(threads|warp)\(\)|host_cuda::cp_async_wait", line):
                yield f"{name}:{number}"


def race_check(main: str, *flags: str, **options) -> Callable:
    """`run(without="")`: runs `main` with a host thread for each CUDA thread under ThreadSanitizer, without one barrier if told
    so -> exit status, what was printed."""
    program = build(main, "-O1", "-fsanitize=thread", "-DHOST_CUDA_THREADS", *flags, **options)

    def run(without=""):
        environment = os.environ | {"HOST_CUDA_DROP_BARRIER": without, "TSAN_OPTIONS": "halt_on_error=1:exitcode=66"}
        done = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=300, check=False)
        return done.returncode, done.stdout + done.stderr

    return run


def check_is_needed(run: Callable, site: str) -> None:
    """Without this barrier a kernel has a data race, and this harness sees it; without a wait, what was copied never comes."""
    status, output = run(without=site)
    if site.startswith("tensor_core"):
        assert status == 1 and "wrong" in output, f"{status}\n{output}"
    else:
        assert status == 66 and "data race" in output, f"{status}\n{output}"
