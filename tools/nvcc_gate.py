"""Compiles every csrc/cuda/*.cu for real GPUs on a machine that has none, and gates on what the compiler made of it.

    python tools/nvcc_gate.py [--arch 80 90]

Prints registers, spills and shared memory of every kernel. Exit status: 0 all green, 1 a file that does not compile or a
kernel that spills registers to memory, 2 the check cannot run (no nvcc).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ["80", "90"]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (
        (home and shutil.which("nvcc", path=f"{home}/bin"))
        or shutil.which("nvcc")
        or shutil.which("nvcc", path="/usr/local/cuda/bin")
    )


def demangle(names: list[str]) -> list[str]:
    """C++ names without their arguments, where c++filt is there; else as they are."""
    if not names or shutil.which("c++filt") is None:
        return names
    lines = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = [re.sub(r"\(anonymous namespace\)::|sl::cuda::|^void ", "", line) for line in lines.splitlines()]
    return [re.sub(r"\(.*", "", re.sub(r"\((?:bool|int)\)", "", line)) for line in short]


def parse(report: str) -> list[dict]:
    """One entry per kernel of ptxas' report: name, registers, spills (bytes), shared (bytes)."""
    kernels = []
    for block in re.split(r"(?=ptxas info\s+: Compiling entry function)", report)[1:]:
        name = re.search(r"entry function '([^']+)'", block)
        registers = re.search(r"Used (\d+) registers", block)
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", block)
        if name is None or registers is None or not spills:
            raise ValueError(f"ptxas' report has an unknown form:\n{block}")
        shared = re.search(r"(\d+) bytes smem", block)
        kernels.append(
            {
                "name": name.group(1),
                "registers": int(registers.group(1)),
                "spills": sum(map(int, spills)),
                "shared": int(shared.group(1)) if shared else 0,
            }
        )
    for kernel, name in zip(kernels, demangle([k["name"] for k in kernels]), strict=True):
        kernel["name"] = name
    return kernels


def compile_file(nvcc: str, source: Path, arch: str) -> tuple[list[dict], str]:
    """The kernels of one file compiled for one architecture, and the compiler's message if that failed."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["-std=c++17", "-O3", f"-arch=sm_{arch}", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", "-cubin"]
        result = subprocess.run(
            [nvcc, *flags, "-o", f"{folder}/out.cubin", str(source)], capture_output=True, text=True, check=False
        )
    if result.returncode:
        return [], result.stderr.strip() or f"nvcc exited with {result.returncode}"
    return parse(result.stderr), ""


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=ARCHS, help="compute capabilities (default: 80 90)")
    arguments = parser.parse_args(argv)
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc_gate: no nvcc in CUDA_HOME/bin, on PATH or in /usr/local/cuda/bin: nothing was checked")
        return 2
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    jobs = [(source, arch) for source in sources for arch in arguments.arch]
    red = 0
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        results = pool.map(lambda job: compile_file(nvcc, *job), jobs)
        print(f"{'file':<18} {'arch':<6} {'kernel':<44} {'registers':>9} {'spills':>7} {'shared':>7}")
        for (source, arch), (kernels, message) in zip(jobs, results, strict=True):
            if message:
                red += 1
                print(f"{source.name:<18} sm_{arch:<3} RED: does not compile\n{message}")
            for k in kernels:
                red += k["spills"] > 0
                print(
                    f"{source.name:<18} sm_{arch:<3} {k['name'][:44]:<44} {k['registers']:>9} {k['spills']:>7} {k['shared']:>7}"
                    + ("  RED: spills" if k["spills"] else "")
                )
    print(f"{red} red" if red else "all green")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
