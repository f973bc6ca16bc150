"""Loads the compiled extension, keeps the reason when it cannot, and reports what this machine has.

Importing this module never fails for want of a compiler, of Triton or of a GPU. It does fail, in one line, under a
torch that is too old.
"""

import contextlib
import functools
import importlib.metadata
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch  # before _C: the extension's OpenMP symbols bind to the pool torch brings

MIN_TORCH = (2, 6)
BUILD_ADVICE = "build it with `pip install .` in the source tree; it takes a C++17 compiler"


def check_torch(version: str) -> None:
    """Raises ImportError when torch's `version` is older than what the package was written for."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and tuple(map(int, found.groups())) < MIN_TORCH:
        least = ".".join(map(str, MIN_TORCH))
        raise ImportError(f"sparselottery needs torch >= {least}, found {version}: pip install --upgrade torch")


check_torch(torch.__version__)

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
        raise RuntimeError(f"sparselottery._C could not be loaded ({WHY_NOT}); {BUILD_ADVICE}")
    return _C


@functools.cache
def why_no_cuda(device: torch.device) -> str | None:
    """Why the CUDA kernels of this build cannot run on a GPU, None if they can; a reason is also a warning, once.

    Without them Triton or plain torch does the work, on the same GPU.
    """
    if _C is None:
        reason = f"sparselottery._C could not be loaded ({WHY_NOT})"
    elif getattr(_C, "cuda_archs", None) is None:
        reason = "this build of sparselottery has no CUDA kernels (nvcc was not found, or SPARSELOTTERY_CUDA=0)"
    else:
        major, minor = torch.cuda.get_device_capability(device)
        least = min(int(arch.rstrip("af")) for arch in _C.cuda_archs.split(";"))
        if 10 * major + minor >= least:  # code for a smaller one runs: its own, or the PTX of the largest
            return None
        reason = f"the CUDA kernels were built for compute capability {least / 10} on, this GPU has {major}.{minor}"
    warnings.warn(f"{reason}: Triton and torch are used instead", RuntimeWarning, stacklevel=2)
    return reason


def has_cuda_kernels(tensor: torch.Tensor) -> bool:
    """Whether the CUDA kernels of this build run on this CUDA tensor's GPU."""
    return why_no_cuda(tensor.device) is None


def cache_dir() -> Path:
    """Where measurements are kept between runs: $SPARSELOTTERY_CACHE, else the user's cache folder.

    Where there is no home to find it in: a folder of this user's among the temporary files.
    """
    chosen = os.environ.get("SPARSELOTTERY_CACHE")
    try:
        if chosen:
            return Path(chosen).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sparselottery"
    except RuntimeError:  # no HOME and a user id without an entry in passwd, as in many a container
        return _temporary_dir()


@functools.cache
def _temporary_dir() -> Path:
    path = Path(tempfile.gettempdir()) / f"sparselottery-{os.getuid()}"
    with contextlib.suppress(OSError):
        path.mkdir(mode=0o700)
    try:
        about = path.lstat()
        own = stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid()
    except OSError:
        own = False
    return path if own else Path(tempfile.mkdtemp(prefix="sparselottery-"))  # anybody can take a name there first


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def build_stamp() -> str | None:
    """Differs between builds of the extension: when its file was written, and how long it is. None without one."""
    if _C is None:
        return None
    about = os.stat(_C.__file__)
    return f"{about.st_mtime_ns}-{about.st_size}"


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def env_report() -> dict:
    """What is installed, what is missing, why, and what to do about it.

    Returns:
        A dict that json can write: "versions", "cpu", "gpu", "build", "cache", "settings" (the SPARSELOTTERY_*
        variables that are set) and "missing", a list of {"what", "why", "do"}, empty when nothing is.
    """
    from . import kernels

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    report = {
        "versions": {
            "sparselottery": package_version("sparselottery"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": kernels.triton.__version__ if kernels.AVAILABLE else None,
            "numpy": package_version("numpy"),
        },
        "cpu": {
            "model": cpu_model(),
            "cores": cores,
            "threads": torch.get_num_threads(),
            "isa": _C.cpu_isa() if hasattr(_C, "cpu_isa") else None,
        },
        "gpu": _gpus(),
        "build": {
            "extension": _C is not None,
            "why_not": WHY_NOT,
            "cuda_archs": getattr(_C, "cuda_archs", None),
            "nvcc": _nvcc(),
            "cxx": shutil.which(os.environ.get("CXX") or "g++"),
        },
        "cache": str(cache_dir()),
        "settings": {k: v for k, v in sorted(os.environ.items()) if k.startswith("SPARSELOTTERY_")},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "executable": sys.executable,
    }
    report["missing"] = _missing(report, kernels)
    return report


def _gpus() -> dict:
    """{"cuda": torch's CUDA version or None, "devices": [{"name", "capability", "memory_gib"}]}."""
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            memory = round(device.total_memory / 2**30, 1)
            devices.append({"name": device.name, "capability": f"{device.major}{device.minor}", "memory_gib": memory})
    return {"cuda": torch.version.cuda, "devices": devices}


def _nvcc() -> str | None:
    """Path and release of the CUDA compiler, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which(
        "nvcc", path="/usr/local/cuda/bin"
    )
    if path is None:
        return None
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return f"{path} (does not run)"
    found = re.search(r"release ([\d.]+)", said)
    return f"{path} ({found.group(1)})" if found else path


def _missing(report: dict, kernels) -> list[dict]:
    found = []

    def add(what, why, do):
        found.append({"what": what, "why": why, "do": do})

    devices = report["gpu"]["devices"]
    if _C is None:
        add("compiled kernels", WHY_NOT, BUILD_ADVICE)
    if not kernels.AVAILABLE:
        add("Triton kernels", kernels.WHY_NOT, "pip install triton, if your machine has an NVIDIA GPU")
    if not devices:
        if torch.version.cuda is None:
            add("GPU", f"torch {torch.__version__} was built without CUDA", "nothing, if there is no NVIDIA GPU here")
        else:
            add("GPU", "torch finds no usable CUDA device", "check nvidia-smi and the driver, if there is one")
    archs = report["build"]["cuda_archs"]
    if devices and _C is not None and archs is None:
        add(
            "CUDA kernels", "the extension was built without nvcc", "install the CUDA toolkit, then pip install . again"
        )
    elif devices and archs:
        known = [int(a.rstrip("af")) for a in archs.split(";")]
        for device in devices:
            if int(device["capability"]) < min(known):
                why = f"built for compute capabilities {archs}, {device['name']} has {device['capability']}"
                add("CUDA kernels", why, f"SPARSELOTTERY_CUDA_ARCHS='{device['capability']};{archs}' pip install .")
    return found


def format_env(report: dict) -> str:
    """`env_report()` as lines for a terminal."""
    versions, cpu, gpu, build = (report[k] for k in ("versions", "cpu", "gpu", "build"))
    devices = [f"{d['name']} (sm_{d['capability']}, {d['memory_gib']} GiB)" for d in gpu["devices"]]
    archs = build["cuda_archs"]
    compiled = f"yes, CUDA kernels for sm {archs.replace(';', ', ')}" if archs else "yes, for the CPU only"
    rows = [(name, version or "not installed") for name, version in versions.items()]
    rows += [
        ("system", report["system"]),
        (
            "processor",
            f"{cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads"
            + (f", {cpu['isa']}" if cpu["isa"] else ""),
        ),
        ("GPU", ", ".join(devices) or "none"),
        ("compiled kernels", compiled if build["extension"] else "no"),
        ("C++ compiler", build["cxx"] or "none"),
        ("CUDA compiler", build["nvcc"] or "none"),
        ("cache", report["cache"]),
    ]
    rows += list(report["settings"].items())
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    for item in report["missing"]:
        lines += ["", f"missing: {item['what']}", f"  why: {item['why']}", f"  do:  {item['do']}"]
    return "\n".join(lines if report["missing"] else [*lines, "", "nothing is missing"])
