"""Compiles every Triton kernel for real GPUs on a machine that has none, and gates on what the compiler made of it.

    python -m sparselottery.kernels.aot [--arch 80 90] [--kernel masked_linear] [--table FILE]

Each kernels/<op>.py lists its configurations as `AOT_CASES`. A row is red when the kernel does not compile, spills
registers to memory, lacks the tensor-core instruction it is meant to use, or computes addresses in 32 bits. Registers and
instructions are read from the machine code with the cuobjdump and nvdisasm that the triton package carries.

Exit status: 0 all rows green, 1 a red row, 2 the check cannot run (no Triton, TRITON_INTERPRET set, an unknown kernel).
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import importlib
import multiprocessing
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ARCHS = (80, 90)
COLUMNS = ("kernel", "config", "arch", "registers", "spills", "shared", "HMMA", "HGMMA", "verdict")


@dataclasses.dataclass(frozen=True)
class AotCase:
    """One configuration of one kernel.

    Attributes:
        name: what the table prints, unique within its module.
        fn: the `@triton.jit` function.
        signature: {argument: Triton type}, such as "*fp32", "*bf16", "i32", "fp32"; constexpr arguments left out.
        constexprs: {argument: value} of every constexpr argument (a stride known to be 1 may stand here too).
        num_warps, num_stages: as in a launch.
        divisible_by_16: arguments to be specialised as multiples of 16 (pointers: 16-byte aligned).
        expect: instructions that must occur; "HGMMA" (sm_90 and later) means HMMA on older architectures.
        int64_indexing: whether offsets must be computed in 64 bits (False only where sizes are bounded).
        archs: compute capabilities this case is meant for.
    """

    name: str
    fn: object
    signature: dict
    constexprs: dict
    num_warps: int = 4
    num_stages: int = 3
    divisible_by_16: tuple = ()
    expect: tuple = ()
    int64_indexing: bool = True
    archs: tuple = ARCHS


def modules() -> list[str]:
    """Names of the modules in this package that export AOT_CASES."""
    package = importlib.import_module("sparselottery.kernels")
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in ("aot", "__init__")]
    return [n for n in sorted(names) if hasattr(importlib.import_module(f"sparselottery.kernels.{n}"), "AOT_CASES")]


def find_tool(name: str) -> str:
    """Path of a tool of NVIDIA's: beside Triton's backend (3.2 to 3.9), where Triton's own setting says, or on PATH."""
    import triton.backends.nvidia

    places = [Path(triton.backends.nvidia.__file__).parent / "bin" / name]
    configured = getattr(getattr(getattr(triton, "knobs", None), "nvidia", None), name, None)
    if configured is not None and getattr(configured, "path", None):
        places.append(Path(configured.path))
    if shutil.which(name):
        places.append(Path(shutil.which(name)))
    for place in places:
        if os.access(place, os.X_OK):
            return str(place)
    raise FileNotFoundError(f"{name} is neither in the triton package nor on PATH")


def compile_case(case: AotCase, arch: int):
    """The compiled kernel (triton.compile's object) of one case for one compute capability. Needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.fn.arg_names
    missing = [n for n in names if n not in case.constexprs and n not in case.signature]
    if missing:
        raise ValueError(f"{case.name}: no type for {', '.join(missing)}")
    signature = {n: "constexpr" if n in case.constexprs else case.signature[n] for n in names}
    constexprs = {(names.index(n),): value for n, value in case.constexprs.items()}
    aligned = [n for n in case.divisible_by_16 if n not in case.constexprs]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(fn=case.fn, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def inspect(cubin: bytes) -> tuple[int, collections.Counter]:
    """Registers per thread and how often each instruction occurs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def read(*command):
            return subprocess.run([*command, str(path)], check=True, capture_output=True, text=True).stdout

        usage = read(find_tool("cuobjdump"), "-res-usage")
        listing = read(find_tool("nvdisasm"), "-c")
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise ValueError("cuobjdump -res-usage names no registers")
    opcodes = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", listing, re.MULTILINE)
    if not opcodes:
        raise ValueError("nvdisasm lists no instructions")
    return int(registers.group(1)), collections.Counter(opcodes)


def judge(case: AotCase, arch: int, counts, ttir: str) -> list[str]:
    """What is wrong with a compiled case; an empty list is a green row."""
    faults = []
    spills = counts["LDL"] + counts["STL"]
    if spills:
        faults.append(f"{spills} spills")
    for opcode in case.expect:
        needed = "HMMA" if opcode == "HGMMA" and arch < 90 else opcode
        if not counts[needed]:
            faults.append(f"no {needed}")
    if case.int64_indexing and not re.search(r"tt\.addptr .*, (tensor<[^>]*xi64>|i64)", ttir):
        faults.append("32-bit indexing")
    return faults


def check(module: str, index: int, arch: int) -> dict:
    """One row of the table: compile case number `index` of a module and judge it."""
    case = importlib.import_module(f"sparselottery.kernels.{module}").AOT_CASES[index]
    row = dict.fromkeys(COLUMNS, "") | {"kernel": module, "config": case.name, "arch": f"sm_{arch}"}
    try:
        kernel = compile_case(case, arch)
        registers, counts = inspect(kernel.asm["cubin"])
    except Exception as error:  # whatever the compiler raises is a red row, not the end of the table
        row["verdict"] = (
            f"RED: {type(error).__name__}: {str(error).strip().splitlines()[-1][:160] if str(error) else ''}"
        )
        return row
    faults = judge(case, arch, counts, kernel.asm["ttir"])
    row |= {"registers": registers, "spills": counts["LDL"] + counts["STL"], "shared": kernel.metadata.shared}
    row |= {
        "HMMA": counts["HMMA"],
        "HGMMA": counts["HGMMA"],
        "verdict": "RED: " + ", ".join(faults) if faults else "ok",
    }
    return row


def table(rows: list[dict]) -> str:
    """The rows as a markdown table with aligned columns."""
    cells = [COLUMNS, *([str(row[c]) for c in COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def run(names: list[str], archs, jobs: int) -> list[dict]:
    """Check every case of the named modules, in `jobs` processes (Triton's compiler holds the GIL)."""
    tasks = []
    for name in names:
        for index, case in enumerate(importlib.import_module(f"sparselottery.kernels.{name}").AOT_CASES):
            tasks += [(name, index, arch) for arch in archs if arch in case.archs]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max(1, min(jobs, len(tasks))), mp_context=context) as pool:
        return list(pool.map(check, *zip(*tasks, strict=True))) if tasks else []


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser("python -m sparselottery.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", type=int, nargs="+", default=list(ARCHS), help="compute capabilities (default: 80 90)"
    )
    parser.add_argument("--kernel", nargs="+", metavar="MODULE", help="only these modules of kernels/")
    parser.add_argument("--table", type=Path, metavar="FILE", help="also write the table here, as markdown")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    options = parser.parse_args(arguments)

    from sparselottery import kernels

    if not kernels.AVAILABLE:
        print(f"aot: Triton is missing ({kernels.WHY_NOT}); pip install triton", file=sys.stderr)
        return 2
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("aot: unset TRITON_INTERPRET: it replaces the compiler by the interpreter", file=sys.stderr)
        return 2
    try:
        find_tool("cuobjdump"), find_tool("nvdisasm")
    except FileNotFoundError as error:
        print(f"aot: {error}", file=sys.stderr)
        return 2
    known = modules()
    unknown = set(options.kernel or ()) - set(known)
    if unknown:
        print(f"aot: no kernel {', '.join(sorted(unknown))}; there are {', '.join(known) or 'none'}", file=sys.stderr)
        return 2
    rows = run(options.kernel or known, options.arch, options.jobs)
    if not rows:
        print("aot: nothing to check", file=sys.stderr)
        return 2
    text = table(rows)
    red = sum(row["verdict"] != "ok" for row in rows)
    print(text)
    print(f"\n{len(rows)} rows, {red} red")
    if options.table:
        options.table.write_text(text + "\n")
    return 1 if red else 0


if __name__ == "__main__":
    # Through the package, so that AotCase is one class for this process and its workers.
    sys.exit(importlib.import_module("sparselottery.kernels.aot").main())
