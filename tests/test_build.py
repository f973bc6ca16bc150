"""setup.py on a small extension of four files: whatever a machine can lack, and rebuilds, wheels and sdists.

Each test works in a copy of the build files, in a folder with a space in its name, with a `torch` that refuses import.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BINDINGS = r"""
#include <Python.h>
#include "stub.h"
int simd_variants();
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__C() {
  PyObject* m = PyModule_Create(&definition);
  PyModule_AddIntConstant(m, "value", STUB_VALUE);
  PyModule_AddIntConstant(m, "variants", simd_variants());
#ifdef _OPENMP
  PyModule_AddIntConstant(m, "openmp", 1);
#else
  PyModule_AddIntConstant(m, "openmp", 0);
#endif
#ifdef SPARSELOTTERY_CUDA
  PyModule_AddStringConstant(m, "cuda_archs", SPARSELOTTERY_CUDA_ARCHS);
#else
  PyModule_AddStringConstant(m, "cuda_archs", "none");
#endif
  return m;
}
"""
SIMD = """
#if defined(SL_ISA_AVX512)
#define LANES 16
#elif defined(SL_ISA_AVX2)
#define LANES 8
#else
#define LANES 1
#endif
namespace SL_ISA { int lanes() { return LANES; } }
"""
VARIANTS = """
namespace portable { int lanes(); }
#ifdef __x86_64__
namespace avx2 { int lanes(); }
namespace avx512 { int lanes(); }
int simd_variants() { return avx512::lanes() * 10000 + avx2::lanes() * 100 + portable::lanes(); }
#else
int simd_variants() { return portable::lanes(); }
#endif
"""


@pytest.fixture
def tree(tmp_path):
    """A source tree of stubs with the project's own setup.py, pyproject.toml and MANIFEST.in."""
    tree = tmp_path / "a tree"
    for name, text in {
        "csrc/bindings.cpp": BINDINGS,
        "csrc/stub.h": "#define STUB_VALUE 1\n",
        "csrc/cpu/op.cpp": VARIANTS,
        "csrc/cpu/op_simd.cpp": SIMD,
        "csrc/cuda/op.cu": "void launch() {}\n",
        "sparselottery/__init__.py": "",
        "sparselottery/ops/__init__.py": "",
        "kernels/__init__.py": "",
        "bench/__init__.py": "",
        "bench/test_bench.py": "",
        "README.md": "stub\n",
    }.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    refuses = tmp_path / "refuses" / "torch"
    refuses.mkdir(parents=True)
    (refuses / "__init__.py").write_text("raise ImportError('the build must not need torch')\n")
    return tree


def tools(folder, *names):
    """A folder to be used as PATH that holds only these programs."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).symlink_to(shutil.which(name))
    return str(folder)


def run(tree, *arguments, **settings):
    """Runs python in `tree` without CUDA unless told; a setting of None unsets the variable."""
    env = {k: v for k, v in os.environ.items() if k not in ("CXX", "CUDA_PATH", "SPARSELOTTERY_CUDA_ARCHS", "MAX_JOBS")}
    env |= {"CUDA_HOME": str(tree / "no cuda"), "SPARSELOTTERY_CUDA": "auto"}
    env["PYTHONPATH"] = str(tree.parent / "refuses")
    env |= {k: str(v) for k, v in settings.items() if v is not None}
    return subprocess.run([sys.executable, *arguments], cwd=tree, env=env, capture_output=True, text=True, timeout=120)


def build(tree, **settings):
    return run(tree, "setup.py", "-q", "build_ext", "--inplace", **settings)


def constants(tree):
    script = "from sparselottery import _C; print({k: v for k, v in vars(_C).items() if not k.startswith('_')})"
    done = run(tree, "-c", script)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout)


def refused(done, message):
    """The build failed with `message` as its last line and never with a traceback."""
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()
    assert re.fullmatch(f"error: sparselottery: {message}", lines[-1]), done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_cpu_build_and_rebuild_after_a_header_changed(tree):
    done = build(tree)
    assert done.returncode == 0, done.stdout + done.stderr
    first = constants(tree)
    assert first["value"] == 1 and first["openmp"] == 1 and first["cuda_archs"] == "none"
    assert first["variants"] in (160801, 1)  # x86: three objects from one file; elsewhere the portable one
    assert "no work to do" in build(tree).stdout
    (tree / "csrc" / "stub.h").write_text("#define STUB_VALUE 2\n")
    again = build(tree)
    assert again.returncode == 0 and "op_simd" not in again.stdout
    assert constants(tree)["value"] == 2


def test_no_compiler_is_one_line(tree):
    done = build(tree, PATH=tools(tree.parent / "bin", "sh"))
    refused(done, "no C\\+\\+ compiler found: install one .*apt install g\\+\\+.*")
    assert len(done.stderr.strip().splitlines()) == 1


def test_no_compiler_through_pip(tree):
    arguments = ("-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps", "-w", "wheels")
    done = run(tree, *arguments, PATH=tools(tree.parent / "bin", "sh"), PIP_DISABLE_PIP_VERSION_CHECK=1)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "error: sparselottery:" in line]
    assert done.returncode != 0 and len(said) == 1 and "apt install g++" in said[0]
    assert "Traceback" not in done.stdout + done.stderr


def test_compiler_that_was_asked_for_is_missing_or_broken(tree):
    refused(build(tree, CXX="no-such-g++"), "CXX='no-such-g\\+\\+' was not found: install one .*")
    broken = tree.parent / "broken-g++"
    broken.write_text("#!/bin/sh\necho 'libcc1plus is missing' >&2; exit 1\n")
    broken.chmod(0o755)
    refused(build(tree, CXX=f"'{broken}'"), ".*does not work or lacks C\\+\\+17 \\(libcc1plus is missing\\).*")


def test_clang_builds_without_openmp(tree):
    clang = tree.parent / "clang++"
    clang.write_text('#!/bin/sh\nexec g++ -D__clang__ "$@"\n')
    clang.chmod(0o755)
    done = build(tree, CXX=f"'{clang}'")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "without OpenMP" in done.stdout + done.stderr and constants(tree)["openmp"] == 0


def test_error_in_the_sources_shows_the_compilers_message(tree):
    (tree / "csrc" / "cpu" / "op.cpp").write_text("int simd_variants() { return oops; }\n")
    done = build(tree)
    refused(done, "compilation failed, the compiler's own message is above")
    assert "oops" in done.stdout + done.stderr


def nvcc_that_knows(tree, *archs):
    """A stand-in for nvcc: lists `archs`, compiles .cu as C++ and writes its arguments to nvcc.log."""
    home = tree.parent / "a cuda"
    (home / "bin").mkdir(parents=True)
    listing = " ".join(f"compute_{a}" for a in archs)
    script = f"""#!{sys.executable}
import subprocess, sys
arguments = sys.argv[1:]
if arguments == ["--list-gpu-arch"]:
    print("\\n".join("{listing}".split()))
    sys.exit()
open({str(tree.parent / "nvcc.log")!r}, "a").write(" ".join(arguments) + "\\n")
takes_value = {{"-gencode", "-Xcompiler", "-cudart", "-ccbin"}}
kept = [a for i, a in enumerate(arguments) if a not in takes_value and (i == 0 or arguments[i - 1] not in takes_value)]
kept = ["-MMD" if a == "-MD" else a for a in kept]
sys.exit(subprocess.call(["g++", "-fPIC", *(["-x", "c++"] if "-c" in kept else []), *kept]))
"""
    (home / "bin" / "nvcc").write_text(script)
    (home / "bin" / "nvcc").chmod(0o755)
    return home


def test_default_archs_shrink_to_what_an_older_nvcc_knows(tree):
    done = build(tree, CUDA_HOME=nvcc_that_knows(tree, 70, 80, 86))
    assert done.returncode == 0, done.stdout + done.stderr
    assert constants(tree)["cuda_archs"] == "80;86"
    log = (tree.parent / "nvcc.log").read_text()
    assert "code=sm_86" in log and "code=compute_86" in log and "sm_90" not in log and "code=compute_80" not in log


def test_nvcc_too_old_for_an_arch_that_was_asked_for(tree):
    home = nvcc_that_knows(tree, 70, 80)
    done = build(tree, CUDA_HOME=home, SPARSELOTTERY_CUDA_ARCHS="80;90a")
    refused(done, ".*nvcc does not know compute capability 90a \\(it knows 70, 80\\): set SPARSELOTTERY_CUDA_ARCHS .*")


def test_chip_specific_arch_is_not_kept_as_ptx(tree):
    home = nvcc_that_knows(tree, 80, 90)
    assert build(tree, CUDA_HOME=home, SPARSELOTTERY_CUDA_ARCHS="80, 90a").returncode == 0
    log = (tree.parent / "nvcc.log").read_text()
    assert "code=sm_90a" in log and "code=compute_80" in log and "code=compute_90a" not in log


def test_cuda_can_be_forbidden_and_demanded(tree):
    home = nvcc_that_knows(tree, 80)
    assert build(tree, CUDA_HOME=home, SPARSELOTTERY_CUDA="0").returncode == 0
    assert constants(tree)["cuda_archs"] == "none"
    refused(build(tree, SPARSELOTTERY_CUDA="1"), "SPARSELOTTERY_CUDA=1 but there is no nvcc .*")


@pytest.mark.parametrize(
    ("name", "value"), [("SPARSELOTTERY_CUDA", "yes"), ("SPARSELOTTERY_CUDA_ARCHS", "sm_80"), ("MAX_JOBS", "many")]
)
def test_bad_settings_are_named(tree, name, value):
    settings = {"CUDA_HOME": nvcc_that_knows(tree, 80), name: value}
    refused(build(tree, **settings), f"{name}: expected .*got '{value}'")


def test_wheel_works_outside_the_tree(tree):
    arguments = ("-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps", "-w", "wheels")
    stale = (
        tree / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "sparselottery" / "old.py"
    )
    stale.parent.mkdir(parents=True)
    stale.write_text("# left by an earlier build\n")
    done = run(tree, *arguments, PIP_DISABLE_PIP_VERSION_CHECK=1)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tree / "wheels").glob("*.whl")
    elsewhere = tree.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(elsewhere)
    expected = {"sparselottery/ops/__init__.py", "sparselottery/kernels/__init__.py", "sparselottery/bench/__init__.py"}
    assert expected <= names and "sparselottery/old.py" not in names
    assert not any("test_" in n or n.startswith(("kernels", "bench", "csrc")) for n in names)
    script = "import sparselottery.kernels; from sparselottery import _C; print(_C.value, _C.__file__)"
    env = {**os.environ, "PYTHONPATH": str(elsewhere)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tree.parent, env=env, capture_output=True, text=True)
    assert done.stdout.startswith("1 ") and str(elsewhere) in done.stdout, done.stderr


def test_sdist_holds_everything_a_build_needs(tmp_path):
    copy = tmp_path / "project"
    unwanted = shutil.ignore_patterns(".git", ".venv", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, copy, ignore=unwanted, symlinks=True)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist"], cwd=copy, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (archive,) = (copy / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    wanted = set()
    for folder in ("csrc", "kernels", "sparselottery", "bench", "tests", "tools"):
        wanted |= {str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*") if p.suffix in SOURCE_KINDS}
    wanted -= {name for name in wanted if "__pycache__" in name or name.startswith("bench/results/")}
    assert wanted <= names, sorted(wanted - names)
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "constraints.txt", "Makefile"} <= names
    assert not any(name.endswith((".so", ".pyc")) for name in names)


SOURCE_KINDS = (".py", ".cpp", ".cu", ".h", ".cuh", ".sh")


def test_build_requirements_leave_torch_out():
    requires = re.search(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert {re.split(r"[<>=~]", r.strip(' "'))[0] for r in requires.split(",")} == {"setuptools", "pybind11", "ninja"}


def test_simd_gate_sees_leaks():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from simd_gate import faults
    finally:
        sys.path.pop(0)
    clean = "0000 T sl::cpu::avx2::forward(float*)\n0010 t helper(int)\n0020 r table\n"
    assert faults(clean, "avx2") == []
    assert faults("0000 W std::vector<int>::size() const\n", "avx2") == ["W std::vector<int>::size() const"]
    assert faults("0000 V inline_variable\n0000 u unique\n", "avx2") == ["V inline_variable", "u unique"]
    assert faults("0000 T sl::cpu::avx512::forward(float*)\n", "avx2") == ["T sl::cpu::avx512::forward(float*)"]
    assert faults("0000 T forward\n", "portable") == ["T forward"]
