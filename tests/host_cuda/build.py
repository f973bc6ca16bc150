"""Compiles csrc/cuda/*.cu with g++ into something that runs on this machine's CPU (see host_cuda.h)."""

import fcntl
import hashlib
import os
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
# fortify: the harness's fibers jump between stacks, which its longjmp check takes for a fault.
FLAGS = "-std=c++20 -g -fPIC -U_FORTIFY_SOURCE -Wall -Wextra -Wno-unknown-pragmas -DHOST_CUDA -DSL_BLOCK_THREADS=64"


def build(main: str, *extra: str, kernels: str = "*", also: tuple = ()) -> Path:
    """The compiled `main` (a file beside this one) together with csrc/cuda/`kernels`.cu; made again only if a source changed.

    `also`: more sources, relative to csrc.

    Several test processes may ask at once: one compiles, the others wait.
    """
    sources = [*sorted((ROOT / "csrc" / "cuda").glob(f"{kernels}.cu")), HERE / main]
    sources += [ROOT / "csrc" / path for path in also]
    inputs = sorted(
        {*sources, *(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.cuh"), *HERE.glob("*.h")}
    )
    command = [*shlex.split(os.environ.get("CXX", "g++")), *FLAGS.split(), *extra]
    command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}", f"-I{HERE}", "-x", "c++", *map(str, sources)]
    digest = hashlib.sha256(shlex.join(command).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "host_cuda"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{Path(main).stem}-{digest.hexdigest()[:16]}"
    with open(folder / f"{main}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            for old in folder.glob(f"{Path(main).stem}-*"):
                old.unlink()
            partial = target.with_suffix(".partial")
            done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"the kernels do not compile for the host:\n{done.stderr}")
            partial.rename(target)
    return target
