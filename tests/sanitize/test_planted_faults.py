"""What the sanitizers of tools/sanitize.py must find: kernels that are told of one element more than there is.

Each fault ends its process, so each runs in one of its own, with the instrumented extension as this one.
"""

import os
import subprocess
import sys

import pytest

from sparselottery import _ext

if "SPARSELOTTERY_SANITIZED" not in os.environ:
    raise RuntimeError("tests/sanitize: run it with `make sanitize` (tools/sanitize.py)")

START = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("sanitize", os.environ["SPARSELOTTERY_SANITIZED"])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.meta_path.insert(0, module.Finder())
import torch
from sparselottery import _ext
C = _ext.extension()
words = torch.full((64, 2), -1, dtype=torch.int32)  # 64 x 64, all kept
x, weight, y = torch.ones(64, 64), torch.ones(64, 64), torch.empty(64, 64)
plan = C.CpuMaskedLinearPlan(words.data_ptr(), 64, 64)
short = torch.empty(64 * 64 - 16)
def forward(x, y):
    plan.forward(weight.data_ptr(), False, 0, False, x.data_ptr(), 64, 64, 0, y.data_ptr(), 0, False, False)
"""


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", START + code], capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stderr


def test_what_is_right_passes():
    assert run("for isa in C.cpu_isas(): C.cpu_set_isa(isa); forward(x, y)") == (0, "")


FAULTS = [("forward(x, short)", isa) for isa in _ext.extension().cpu_isas()] + [("forward(short, y)", "portable")]


@pytest.mark.parametrize("fault, isa", FAULTS)
def test_a_buffer_that_is_too_short_is_found(fault, isa):
    status, report = run(f"C.cpu_set_isa({isa!r}); {fault}")
    assert status != 0 and "AddressSanitizer: heap-buffer-overflow" in report, report
    assert "csrc/cpu/masked_linear_simd.cpp" in report, report


def test_what_is_undefined_is_found():
    status, report = run("C.cpu_bitmask_count(words.data_ptr() + 1, 16)")
    assert status != 0 and "runtime error" in report and "misaligned" in report, report
