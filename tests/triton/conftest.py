"""These tests run Triton's interpreter on CPU tensors, so they need a process of their own: `pytest tests/triton`.

TRITON_INTERPRET counts when triton is first imported. A process that has imported it without (torch.compile does) would
run the compiler instead, which needs a GPU.
"""

import os
import sys

import pytest

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError(
        "tests/triton: triton was imported before TRITON_INTERPRET=1 was set; run `pytest tests/triton` alone"
    )
os.environ["TRITON_INTERPRET"] = "1"

import triton
from triton.runtime.interpreter import InterpretedFunction

if not isinstance(triton.language.cdiv, InterpretedFunction):
    raise pytest.UsageError("tests/triton: triton did not switch to its interpreter; run `pytest tests/triton` alone")
