"""Compiles every csrc/cuda/*.cu for real GPUs on a machine that has none, and gates on what the compiler made of it.

    python tools/nvcc_gate.py [--arch 80 90a]

Prints registers, spills, shared memory and tensor-core instructions of every kernel. Exit status: 0 all green, 1 a file that
does not compile, a kernel that spills registers to memory, or one that lacks the tensor-core instruction it is meant to use
(seen only where there is an nvdisasm: CUDA's or the one in the triton package), 2 the check cannot run (no nvcc).
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ["80", "90a"]
TENSOR_CORES = {"tiles": "HMMA", "product_half": "HMMA"}  # kernel -> the instruction that its product must be made of


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (
        (home and shutil.which("nvcc", path=f"{home}/bin"))
        or shutil.which("nvcc")
        or shutil.which("nvcc", path="/usr/local/cuda/bin")
    )


def find_nvdisasm() -> str | None:
    """CUDA's, or the one that the triton package carries."""
    beside = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [f"{home}/bin" for home in beside if home]
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin:
        places.append(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which("nvdisasm") or next(filter(None, (shutil.which("nvdisasm", path=p) for p in places)), None)


def tensor_instructions(listing: str) -> dict[str, dict[str, int]]:
    """How often each tensor-core instruction occurs in each kernel of nvdisasm's listing, by mangled name."""
    found = {}
    for part in re.split(r"(?=^\.text\.\S+:$)", listing, flags=re.MULTILINE)[1:]:
        counts = found.setdefault(re.match(r"\.text\.(\S+):", part).group(1), {})
        for opcode in re.findall(r"\s((?:H|HG|I|IG|QG|D)MMA)\.", part):
            counts[opcode] = counts.get(opcode, 0) + 1
    return found


def faults(kernel: dict) -> list[str]:
    """What is wrong with a kernel; an empty list is a green one."""
    wrong = ["spills"] if kernel["spills"] else []
    needed = TENSOR_CORES.get(kernel["name"].split("<")[0])
    if needed and kernel["tensor"] is not None and needed not in kernel["tensor"]:
        wrong.append(f"no {needed}")
    return wrong


def demangle(names: list[str]) -> list[str]:
    """C++ names without their arguments, where c++filt is there; else as they are."""
    if not names or shutil.which("c++filt") is None:
        return names
    lines = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = [re.sub(r"\(anonymous namespace\)::|sl::cuda::|^void ", "", line) for line in lines.splitlines()]
    return [re.sub(r"\(.*", "", re.sub(r"\((?:bool|int|sl::DType)\)", "", line)) for line in short]


def parse(report: str) -> list[dict]:
    """One entry per kernel of ptxas' report: symbol, name, registers, spills (bytes), shared (bytes, static)."""
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
                "symbol": name.group(1),
                "registers": int(registers.group(1)),
                "spills": sum(map(int, spills)),
                "shared": int(shared.group(1)) if shared else 0,
            }
        )
    for kernel, name in zip(kernels, demangle([k["symbol"] for k in kernels]), strict=True):
        kernel["name"] = name
    return kernels


def compile_file(nvcc: str, source: Path, arch: str) -> tuple[list[dict], str]:
    """The kernels of one file compiled for one architecture, and the compiler's message if that failed.

    Besides what `parse` reads a kernel has "tensor": {tensor-core instruction: how often}, None without an nvdisasm.
    """
    nvdisasm = find_nvdisasm()
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/out.cubin"
        flags = ["-std=c++17", "-O3", f"-arch=sm_{arch}", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", "-cubin"]
        result = subprocess.run([nvcc, *flags, "-o", cubin, str(source)], capture_output=True, text=True, check=False)
        if result.returncode:
            return [], result.stderr.strip() or f"nvcc exited with {result.returncode}"
        listing = None
        if nvdisasm is not None:
            listing = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True).stdout
    kernels = parse(result.stderr)
    found = None if listing is None else tensor_instructions(listing)
    for kernel in kernels:
        kernel["tensor"] = None if found is None else found[kernel["symbol"]]
    return kernels, ""


def check(nvcc: str, archs) -> list[tuple[str, str, list[dict], str]]:
    """(file, arch, kernels, message) of every source for every architecture; several compilers run at once."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    jobs = [(source, arch) for source in sources for arch in archs]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        results = list(pool.map(lambda job: compile_file(nvcc, *job), jobs))
    return [(source.name, arch, *result) for (source, arch), result in zip(jobs, results, strict=True)]


def tensor_text(kernel: dict) -> str:
    if kernel["tensor"] is None:
        return "unknown"
    return " ".join(f"{opcode} {count}" for opcode, count in sorted(kernel["tensor"].items())) or "-"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=ARCHS, help="compute capabilities (default: 80 90a)")
    arguments = parser.parse_args(argv)
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc_gate: no nvcc in CUDA_HOME/bin, on PATH or in /usr/local/cuda/bin: nothing was checked")
        return 2
    red = 0
    head = ("registers", "spills", "shared")
    print(f"{'file':<18} {'arch':<6} {'kernel':<44} {head[0]:>9} {head[1]:>7} {head[2]:>7}  tensor cores")
    for name, arch, kernels, message in check(nvcc, arguments.arch):
        if message:
            red += 1
            print(f"{name:<18} sm_{arch:<3} RED: does not compile\n{message}")
        for k in kernels:
            wrong = faults(k)
            red += bool(wrong)
            print(
                f"{name:<18} sm_{arch:<3} {k['name'][:44]:<44} {k['registers']:>9} {k['spills']:>7} {k['shared']:>7}"
                f"  {tensor_text(k)}" + (f"  RED: {', '.join(wrong)}" if wrong else "")
            )
    print(f"{red} red" if red else "all green")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
