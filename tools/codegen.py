"""Writes bench/CODEGEN.md: what the compilers made of every kernel, CUDA C++ and Triton, on a machine without a GPU.

    python tools/codegen.py [--out FILE]

Registers, spills, shared memory and tensor-core instructions of each kernel for sm_80 and sm_90a (Triton: sm_90, which is
compiled as 90a). Takes some minutes. Exit status: 0 all green, 1 a red row, 2 no nvcc or no Triton: the file is left alone.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import nvcc_gate

OUT = nvcc_gate.ROOT / "bench" / "CODEGEN.md"
CUDA_COLUMNS = ("file", "kernel", "arch", "registers", "spills", "shared", "tensor cores", "verdict")
HEAD = """# What the compilers make of the kernels

Made by `python tools/codegen.py`; nothing here was measured on a GPU. Registers are per thread. Spills: bytes that ptxas
reports for CUDA C++, instructions that touch local memory for Triton. Shared memory in bytes; for CUDA C++ only what is
static (decode_linear asks for its own at launch). Tensor cores: how often HMMA (sm_80 and mma.sync) and HGMMA (sm_90's
wgmma) occur. A red row fails `make gates`.
"""


def cuda_rows(results) -> list[dict]:
    """Rows for the table from what nvcc_gate.check returns."""
    rows = []
    for file, arch, kernels, message in results:
        common = dict.fromkeys(CUDA_COLUMNS, "") | {"file": file, "arch": f"sm_{arch}"}
        if message:
            rows.append(common | {"verdict": f"RED: {message.splitlines()[-1]}"})
        for kernel in kernels:
            wrong = nvcc_gate.faults(kernel)
            fields = {"kernel": f"`{kernel['name']}`", "tensor cores": nvcc_gate.tensor_text(kernel)}
            fields |= {name: kernel[name] for name in ("registers", "spills", "shared")}
            rows.append(common | fields | {"verdict": f"RED: {', '.join(wrong)}" if wrong else "ok"})
    return rows


def table(rows: list[dict], columns) -> str:
    """A markdown table with aligned columns."""
    cells = [columns, *([str(row[c]).replace("|", "\\|") for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="default: bench/CODEGEN.md")
    arguments = parser.parse_args(argv)
    from sparselottery import kernels

    nvcc = nvcc_gate.find_nvcc()
    missing = [] if nvcc else ["nvcc"]
    if not kernels.AVAILABLE or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        missing.append("Triton's compiler")
    if missing:
        print(f"codegen: {' and '.join(missing)} missing: nothing was written", file=sys.stderr)
        return 2
    from sparselottery.kernels import aot

    ours = cuda_rows(nvcc_gate.check(nvcc, nvcc_gate.ARCHS))
    theirs = aot.run(aot.modules(), aot.ARCHS, os.cpu_count() or 1)
    parts = [HEAD, "## CUDA C++ (csrc/cuda)\n", table(ours, CUDA_COLUMNS) + "\n"]
    parts += ["## Triton (kernels)\n", table(theirs, aot.COLUMNS) + "\n"]
    arguments.out.write_text("\n".join(parts))
    red = sum(row["verdict"] != "ok" for row in ours + theirs)
    print(f"{arguments.out}: {len(ours)} rows of CUDA C++, {len(theirs)} of Triton, {red} red")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
