"""Builds sparselottery._C with ninja: g++ for csrc/**/*.cpp, nvcc for csrc/**/*.cu where a CUDA toolkit is found. No torch headers.

Environment:
    SPARSELOTTERY_CUDA        auto (default): use nvcc if there is one; 0: never; 1: fail without it
    SPARSELOTTERY_CUDA_ARCHS  compute capabilities, default "80;86;89;90"; the last one is also kept as PTX for newer GPUs
    MAX_JOBS                  parallel compiler processes
    CXX, CUDA_HOME            which compilers
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# A file csrc/cpu/*_simd.cpp is compiled once per instruction set, each time into its own namespace (macro SL_ISA), and the op
# picks at run time. Such files include no standard templates: the linker would merge an AVX-512 copy into everybody's code.
X86_ISAS = {
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mbmi2 -mpopcnt",
    "avx2": "-mavx2 -mfma -mf16c -mbmi2 -mpopcnt",
    "portable": "",
}


def fail(message):
    sys.exit(f"error: sparselottery: {message}")


def find_cxx():
    cxx = shlex.split(os.environ.get("CXX", "g++"))
    if not cxx or shutil.which(cxx[0]) is None:
        fail(f"no C++ compiler {cxx[0] if cxx else 'in CXX'!r}: install one (Debian/Ubuntu: apt install g++) or set CXX")
    return shlex.join(cxx)


def find_nvcc():
    choice = os.environ.get("SPARSELOTTERY_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        fail(f"SPARSELOTTERY_CUDA: expected auto, 0 or 1, got {choice!r}")
    if choice == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")
    nvcc = nvcc or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None and choice == "1":
        fail("SPARSELOTTERY_CUDA=1 but there is no nvcc in CUDA_HOME/bin, on PATH or in /usr/local/cuda/bin")
    return nvcc


def escape(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """One build.ninja for the whole extension: incremental, parallel, and the same for normal, isolated and editable installs."""

    def build_extension(self, ext):
        import ninja
        import pybind11

        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(self.rules(ext.sources, out, work, pybind11.get_include()))
        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(work)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        if subprocess.call(command):
            fail("the compiler stopped with an error (its message is above)")

    def rules(self, sources, out, work, pybind_include):
        cxx, nvcc = find_cxx(), find_nvcc()
        archs = os.environ.get("SPARSELOTTERY_CUDA_ARCHS", "80;86;89;90").replace(",", ";").split(";")
        if not all(a.strip().rstrip("af").isdigit() for a in archs):
            fail(f"SPARSELOTTERY_CUDA_ARCHS: expected numbers like 80;90, got {';'.join(archs)!r}")
        includes = " ".join(f'"-I{p}"' for p in (ROOT / "csrc", pybind_include, sysconfig.get_paths()["include"]))
        defines = f"-DSPARSELOTTERY_CUDA -DSPARSELOTTERY_CUDA_ARCHS='\"{';'.join(archs)}\"'" if nvcc else ""
        optimize = "-O0 -g" if self.debug else "-O3 -DNDEBUG"
        warn = "-Wall -Wextra -Wno-unknown-pragmas"
        # -fopenmp when compiling but not when linking: the GOMP symbols stay open and bind to the pool torch has loaded; a
        # second libgomp would spin against it (0.2 ms became 9.2 ms).
        lines = [
            "ninja_required_version = 1.5",
            f"cxx = {cxx}",
            f"cflags = -std=c++17 -fPIC -fvisibility=hidden -fopenmp -ffp-contract=off {warn} {optimize} {includes} {defines}",
            "rule cxx",
            "  command = $cxx -MMD -MF $out.d $cflags $isa -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        if nvcc:
            archs = [a.strip() for a in archs]
            code = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in archs)
            code += f" -gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"
            lines += [
                f"nvcc = {nvcc}",
                f"nvflags = -std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden {code} \"-I{ROOT / 'csrc'}\"",
                "rule nvcc",
                "  command = $nvcc -MD -MF $out.d $nvflags -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
            ]
        # nvcc links when it is there: it knows where its own static CUDA runtime lies.
        link = "$nvcc -shared -Xcompiler -fPIC -cudart static" if nvcc else "$cxx -shared"
        lines += ["rule link", f"  command = {link} $in -o $out"]
        objects = []

        def compile_rule(source, rule, suffix="", isa=""):
            target = work / (source.replace("/", "_") + suffix + ".o")
            objects.append(target)
            lines.append(f"build {escape(target)}: {rule} {escape(ROOT / source)}")
            if isa:
                lines.append(f"  isa = {isa}")

        x86 = platform.machine() in ("x86_64", "AMD64")
        for source in sources:
            if source.endswith(".cu"):
                if nvcc:
                    compile_rule(source, "nvcc")
            elif source.endswith("_simd.cpp"):
                for name, flags in X86_ISAS.items():
                    if x86 or name == "portable":
                        # These kernels use multiply-add on purpose; elsewhere contraction stays off so that sums round alike.
                        isa = f"-DSL_ISA={name} -DSL_ISA_{name.upper()} -ffp-contract=fast {flags}"
                        compile_rule(source, "cxx", "." + name, isa)
            else:
                compile_rule(source, "cxx")
        lines.append(f"build {escape(out)}: link {' '.join(map(escape, objects))}")
        return "\n".join(lines) + "\n"


sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu"))
setup(ext_modules=[Extension("sparselottery._C", sources)], cmdclass={"build_ext": NinjaBuild})
