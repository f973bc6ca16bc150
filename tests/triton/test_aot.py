"""The ahead-of-time gate: what makes a row red, and its exit statuses."""

import collections
import os
import subprocess
import sys

import pytest

from sparselottery.kernels import aot

CASE = aot.AotCase("case", fn=None, signature={}, constexprs={}, expect=("HGMMA",))
WIDE = "%2 = tt.addptr %0, %1 : tensor<64x32x!tt.ptr<bf16>>, tensor<64x32xi64> loc(#loc8)"


def command(*arguments, interpret=None):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = interpret
    return subprocess.run(
        [sys.executable, "-m", "sparselottery.kernels.aot", *arguments], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "counts, arch, ttir, faults",
    [
        ({"HGMMA": 4}, 90, WIDE, []),
        ({"HMMA": 4}, 80, WIDE, []),
        ({"HMMA": 4}, 90, WIDE, ["no HGMMA"]),
        ({}, 80, WIDE, ["no HMMA"]),
        ({"HGMMA": 4, "LDL": 1, "STL": 2}, 90, WIDE, ["3 spills"]),
        ({"HGMMA": 4}, 90, WIDE.replace("i64", "i32"), ["32-bit indexing"]),
    ],
)
def test_a_row_is_red_for_a_reason(counts, arch, ttir, faults):
    assert aot.judge(CASE, arch, collections.Counter(counts), ttir) == faults


def test_every_argument_needs_a_type():
    class Function:
        arg_names = ("x", "n")

    with pytest.raises(ValueError, match="no type for n"):
        aot.compile_case(aot.AotCase("case", Function, {"x": "*fp32"}, {}), 90)


def test_the_interpreter_is_refused():
    result = command(interpret="1")
    assert result.returncode == 2 and "unset TRITON_INTERPRET" in result.stderr and len(result.stderr.splitlines()) == 1


def test_an_unknown_kernel_is_refused():
    result = command("--kernel", "no_such_kernel")
    assert result.returncode == 2 and "no kernel no_such_kernel" in result.stderr
