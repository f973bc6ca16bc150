"""Triton kernels, one file per op. Lives at the top of the source tree, imports only as `sparselottery.kernels`."""

if __name__ != "sparselottery.kernels":
    raise ImportError("import these kernels as `sparselottery.kernels`; install the package first (pip install -e .)")

try:
    import triton

    AVAILABLE = True
    WHY_NOT = None
except Exception as error:  # a broken driver or a wrong LLVM raises more than ImportError
    triton = None
    AVAILABLE = False
    WHY_NOT = f"{type(error).__name__}: {error}".splitlines()[0]
