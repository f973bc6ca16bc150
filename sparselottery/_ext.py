"""Loads the compiled extension and keeps the reason when it cannot."""

import torch  # first: the extension's OpenMP symbols bind to the pool torch brings

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # sl::DType in csrc/common.h

try:
    from . import _C
except ImportError as error:
    _C = None
    WHY_NOT = str(error)
else:
    WHY_NOT = None


def extension():
    """The compiled module `sparselottery._C`.

    Raises:
        RuntimeError: it is not there; the message says why and how to build it.
    """
    if _C is None:
        raise RuntimeError(
            f"sparselottery._C could not be loaded ({WHY_NOT}); build it with `pip install .` and a C++17 compiler"
        )
    return _C
