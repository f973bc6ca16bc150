"""Triton kernels, one file per op. Lives at the top of the source tree, imports only as `sparselottery.kernels`.

`AVAILABLE` says whether Triton can be imported and `WHY_NOT` why it cannot; `triton` is the module or None. Triton is
imported when one of them is first asked for (it takes half a second), and a file of kernels only where AVAILABLE.
"""

if __name__ != "sparselottery.kernels":
    raise ImportError("import these kernels as `sparselottery.kernels`; install the package first (pip install -e .)")


def __getattr__(name):
    if name not in ("AVAILABLE", "WHY_NOT", "triton"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import triton

        found = {"triton": triton, "AVAILABLE": True, "WHY_NOT": None}
    except Exception as error:  # a broken driver or a wrong LLVM raises more than ImportError
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        found = {"triton": None, "AVAILABLE": False, "WHY_NOT": reason}
    globals().update(found)
    return found[name]
