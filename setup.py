"""Builds sparselottery._C without torch headers: ninja runs g++ on csrc/**/*.cpp and, if found, nvcc on csrc/**/*.cu.

Environment:
    SPARSELOTTERY_CUDA        auto (default): use nvcc if there is one; 0: never; 1: fail without it
    SPARSELOTTERY_CUDA_ARCHS  compute capabilities, default "80;86;89;90"; the newest also as PTX for later GPUs
    MAX_JOBS                  parallel compiler processes
    CXX, CUDA_HOME            which compilers
    SPARSELOTTERY_SANITIZE    1: with AddressSanitizer and UBSan, without CUDA (tools/sanitize.py; g++ only)
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = ["80", "86", "89", "90"]
# A file csrc/cpu/*_simd.cpp is compiled once per instruction set, each time into its own namespace (macro SL_ISA), and
# the op picks at run time. Such files include no standard templates: the linker would merge an AVX-512 copy into
# everybody's code.
X86_ISAS = {
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mbmi2 -mpopcnt",
    "avx2": "-mavx2 -mfma -mf16c -mbmi2 -mpopcnt",
    "portable": "",
}


def fail(message):
    """One line for the user and no traceback, under pip too."""
    sys.stdout.flush()
    sys.exit(f"error: sparselottery: {message}")


def find_cxx():
    """The C++ compiler as a shell-quoted command, and whether it is clang."""
    asked = os.environ.get("CXX", "").strip()
    candidates = [shlex.split(asked)] if asked else [["g++"], ["clang++"], ["c++"]]
    found = next((c for c in candidates if shutil.which(c[0])), None)
    if found is None:
        what = f"CXX={asked!r} was not found" if asked else "no C++ compiler found"
        fail(f"{what}: install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++) or point CXX to it")
    probe = subprocess.run([*found, "-std=c++17", "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True)
    if probe.returncode:
        reason = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        fail(f"the C++ compiler {shlex.join(found)} does not work or lacks C++17 ({reason}): install g++ 9 or newer")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        fail(f"the headers of Python {version} are missing (Python.h): Debian, Ubuntu: apt install python{version}-dev")
    return shlex.join(found), "__clang__" in probe.stdout


def sanitize_flags():
    """What instruments the host's code, "" where nobody asked; the first error ends the process."""
    choice = os.environ.get("SPARSELOTTERY_SANITIZE", "0")
    if choice not in ("", "0", "1"):
        fail(f"SPARSELOTTERY_SANITIZE: expected 0 or 1, got {choice!r}")
    return "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer" if choice == "1" else ""


def find_nvcc():
    if sanitize_flags():
        return None
    choice = os.environ.get("SPARSELOTTERY_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        fail(f"SPARSELOTTERY_CUDA: expected auto, 0 or 1, got {choice!r}")
    if choice == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin"] if home else [None, "/usr/local/cuda/bin"]
    nvcc = next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)
    if nvcc is None and choice == "1":
        where = f"{home}/bin" if home else "on PATH or in /usr/local/cuda/bin"
        fail(f"SPARSELOTTERY_CUDA=1 but there is no nvcc {where}: install the CUDA toolkit or set CUDA_HOME")
    return nvcc


def find_archs(nvcc):
    """The compute capabilities to build for: the default list shrinks to what this nvcc knows, another must fit."""
    asked = os.environ.get("SPARSELOTTERY_CUDA_ARCHS", "").strip()
    archs = [a for a in re.split(r"[;,\s]+", asked) if a] if asked else DEFAULT_ARCHS
    if not archs or not all(re.fullmatch(r"\d{2,3}[af]?", a) for a in archs):
        fail(f"SPARSELOTTERY_CUDA_ARCHS: expected numbers like 80;90, got {asked!r}")
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    known = re.findall(r"compute_(\d+)", listed.stdout)
    if listed.returncode or not known:
        fail(f"{nvcc} does not work or is older than CUDA 11.1; install a newer toolkit or set SPARSELOTTERY_CUDA=0")
    if not asked:
        archs = [a for a in archs if a in known]
    missing = [a for a in archs if a.rstrip("af") not in known]
    if missing or not archs:
        what = f"{nvcc} does not know compute capability {', '.join(missing or DEFAULT_ARCHS)}"
        fail(f"{what} (it knows {', '.join(known)}): set SPARSELOTTERY_CUDA_ARCHS or install another toolkit")
    return archs


def find_ninja():
    try:
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    except ImportError:
        return shutil.which("ninja") or fail("ninja is missing: pip install ninja")


def find_pybind11():
    try:
        import pybind11

        return pybind11.get_include()
    except ImportError:
        fail("pybind11 is missing: pip install pybind11")


def escape(path):
    """A path as ninja's build lines want it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def quote(text):
    """A word for the shell, inside a variable of build.ninja."""
    return shlex.quote(str(text)).replace("$", "$$")


class Build(build):
    def run(self):
        find_cxx()  # before files are copied about, so that the reason is not buried
        shutil.rmtree(self.build_lib, ignore_errors=True)  # a module that has gone must not stay in the wheel
        super().run()


class BuildPy(build_py):
    def find_package_modules(self, package, package_dir):
        """Leaves the pytest files of bench/ out of the installed package."""
        modules = super().find_package_modules(package, package_dir)
        return [m for m in modules if not m[1].startswith(("test_", "conftest"))]


class NinjaBuild(build_ext):
    """One build.ninja for the whole extension: incremental, parallel, the same for normal, isolated and editable."""

    def build_extension(self, ext):
        jobs = os.environ.get("MAX_JOBS", "").strip()
        if jobs and not (jobs.isdigit() and int(jobs)):
            fail(f"MAX_JOBS: expected a positive number, got {jobs!r}")
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        # setuptools gives an editable install a throw-away folder; a lasting one keeps the next build incremental.
        lasting = f"build/temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        work = ROOT / lasting if getattr(self, "editable_mode", False) else Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        nvcc = find_nvcc()
        (work / "build.ninja").write_text(self.rules(ext.sources, out, work, nvcc))
        command = [find_ninja(), "-C", str(work)] + (["-j", jobs] if jobs else [])
        if subprocess.call(command):
            hint = "; SPARSELOTTERY_CUDA=0 builds without CUDA" if nvcc else ""
            fail(f"compilation failed, the compiler's own message is above{hint}")

    def rules(self, sources, out, work, nvcc):
        cxx, clang = find_cxx()
        archs = find_archs(nvcc) if nvcc else []
        # For bindings.cpp only: build isolation moves pybind11 with every build, which must not recompile the kernels.
        python = " ".join(quote(f"-I{p}") for p in (find_pybind11(), sysconfig.get_paths()["include"]))
        defines = "-DSPARSELOTTERY_CUDA " + quote(f'-DSPARSELOTTERY_CUDA_ARCHS="{";".join(archs)}"') if nvcc else ""
        optimize = "-O0 -g" if self.debug else "-O3 -DNDEBUG"
        sanitize = sanitize_flags()
        if sanitize:
            optimize = f"-O1 -g {sanitize}"
        # -fopenmp when compiling but not when linking: the GOMP symbols stay open and bind to the pool torch has
        # loaded; a second libgomp would spin against it (0.2 ms became 9.2 ms). clang's OpenMP is another library,
        # which torch's Linux wheels do not carry: with clang the kernels are built for one thread.
        if clang:
            self.warn("clang: building without OpenMP, kernels will use one thread (g++ builds them for many)")
        openmp = "" if clang else "-fopenmp"
        warn = "-Wall -Wextra -Wno-unknown-pragmas"
        lines = [
            "ninja_required_version = 1.5",
            f"cxx = {cxx.replace('$', '$$')}",
            f"headers = {quote(f'-I{ROOT}/csrc')}",
            "std = -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off",
            f"cflags = $std {openmp} {warn} {optimize} $headers {defines}",
            "rule cxx",
            "  command = $cxx -MMD -MF $out.d $cflags $python $isa -c $in -o $out",
            "  description = C++ $in $isa_name",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        if nvcc:
            code = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in archs)
            portable = [a for a in archs if a.isdigit()]  # 90a and the like run on that one chip only
            if portable:
                newest = max(portable, key=int)
                code += f" -gencode arch=compute_{newest},code=compute_{newest}"
            host = f"-ccbin {cxx.replace('$', '$$')}" if os.environ.get("CXX") and len(shlex.split(cxx)) == 1 else ""
            lines += [
                f"nvcc = {quote(nvcc)} {host}",
                f"nvflags = -std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden {code} $headers",
                "rule nvcc",
                "  command = $nvcc -MD -MF $out.d $nvflags -c $in -o $out",
                "  description = CUDA $in",
                "  depfile = $out.d",
                "  deps = gcc",
            ]
        # nvcc links when it is there: it knows where its own static CUDA runtime lies.
        link = "$nvcc -shared -Xcompiler -fPIC -cudart static" if nvcc else f"$cxx -shared {sanitize}"
        lines += ["rule link", f"  command = {link} $in -o $out", "  description = link $out"]
        objects = []

        def compile_rule(source, rule, name="", isa=""):
            target = work / (source.replace("/", "_") + (f".{name}" if name else "") + ".o")
            objects.append(target)
            lines.append(f"build {escape(target)}: {rule} {escape(ROOT / source)}")
            if name:
                lines.extend([f"  isa = {isa}", f"  isa_name = ({name})"])

        x86 = platform.machine() in ("x86_64", "AMD64")
        for source in sources:
            if source.endswith(".cu"):
                if nvcc:
                    compile_rule(source, "nvcc")
            elif source.endswith("_simd.cpp"):
                for name, flags in X86_ISAS.items():
                    if x86 or name == "portable":
                        # These kernels mean multiply-add; elsewhere contraction stays off so that sums round alike.
                        isa = f"-DSL_ISA={name} -DSL_ISA_{name.upper()} -ffp-contract=fast {flags}"
                        compile_rule(source, "cxx", name, isa)
            else:
                compile_rule(source, "cxx")
                if Path(source).name == "bindings.cpp":
                    lines.append(f"  python = {python}")
        lines.append(f"build {escape(out)}: link {' '.join(map(escape, objects))}")
        return "\n".join(lines) + "\n"


def mapped_packages():
    """kernels/ and bench/ lie at the top of the tree and are installed as packages of sparselottery."""
    return {f"sparselottery.{name}": name for name in ("kernels", "bench") if (ROOT / name / "__init__.py").is_file()}


sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu"))
setup(
    packages=[*find_packages(str(ROOT), include=["sparselottery", "sparselottery.*"]), *mapped_packages()],
    package_dir={"sparselottery": "sparselottery", **mapped_packages()},
    ext_modules=[Extension("sparselottery._C", sources)],
    cmdclass={"build": Build, "build_py": BuildPy, "build_ext": NinjaBuild},
)
