"""Runs the ops' tests on an extension built with AddressSanitizer and UBSan.

    python tools/sanitize.py [PYTEST ARGUMENT ...]

builds csrc/ (without CUDA) into build/sanitize, then runs tests/sanitize, where planted faults must be found, and the tests
of the CPU kernels in TESTS; with arguments, what they ask for. The first out-of-bounds access or undefined operation ends the
run with its stack. Leaks are not looked for: Python and torch leave memory to the end of the process.

Loads and stores of whole vectors are checked, masked ones (the last lanes of a row) are not: GCC does not instrument them.
Needs g++ with its libasan. Exit status: that of the tests, 2 where the build is not possible.
"""

import importlib.abc
import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "sanitize"
# Of each op's tests those that reach every line and every edge of its kernels, to be done in some three minutes.
TESTS = {
    "bitmask": ("any_shape", "apply_to_any_strides", "packing_a_strided_mask"),
    "decode_cpu": ("round_trip", "parity_property", "any_number_of_threads_gives_the_same_bits"),
    "decode_linear": ("round_trip",),
    "global_topk": ("small_lists", "weights_that_are_only_element_aligned"),
    "masked_conv2d": ("any_convolution", "special_masks"),
    "masked_linear_cpu": (
        *("cpu_parity_property", "one_sample_with_gathers_and_with_loads", "cpu_writes_every_element"),
        *("cpu_large_gradient_is_streamed_to_every_element", "cpu_is_the_same_for_any_number_of_threads"),
        "cpu_dense_products_under_the_mask",
    ),
    "masked_optim": ("strides_do_not_matter", "any_number_of_threads_gives_the_same_bits"),
    "network": ("max_pooling_of_ties_and_special_values", "new_values_and_a_second_tape"),
    "network_small": ("forward_and_backward", "training_steps", "resident_convolutions", "resident_linear_layers"),
    "nn_resident_training": ("memory_of_gradients_is_lent_again_with_zeros_off_the_mask", "pruning_between_steps"),
    "packed": ("sparse_kernels_match_float64", "every_element_of_the_output_is_written"),
    "whole_step": ("widths_that_fill_no_vector",),
}


class Finder(importlib.abc.MetaPathFinder):
    """Makes `import sparselottery._C` take the instrumented build."""

    def find_spec(self, name, path=None, target=None):
        if name != "sparselottery._C":
            return None
        return importlib.util.spec_from_file_location(name, next((FOLDER / "lib").rglob("_C*.so")))


def build() -> None:
    environment = os.environ | {"SPARSELOTTERY_SANITIZE": "1"}
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        FOLDER / "lib",
        "--build-temp",
        FOLDER / "temp",
    ]
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
        sys.exit(2)


def library(name: str) -> str:
    """Where the compiler keeps one of its shared libraries."""
    cxx = shlex.split(os.environ.get("CXX", "").strip() or "g++")
    found = subprocess.run(
        [*cxx, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_file():
        print(f"sanitize: error: {shlex.join(cxx)} has no {name}: install g++ with its sanitizers", file=sys.stderr)
        sys.exit(2)
    return found


def main(arguments) -> int:
    build()
    # ASan must come first; without libstdc++ beside it, it finds no __cxa_throw to watch.
    environment = os.environ | {
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:handle_segv=1:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
        "PYTHONMALLOC": "malloc",
        "SPARSELOTTERY_SANITIZED": str(Path(__file__).resolve()),
    }
    tests = [f"tests/test_{name}.py::test_{test}" for name, those in TESTS.items() for test in those]
    for chosen in [arguments] if arguments else (["tests/sanitize"], tests):
        # --capture=sys: what a sanitizer says, past Python, must not be lost with the process.
        command = [
            sys.executable,
            __file__,
            "--tests",
            "-q",
            "-p",
            "no:cacheprovider",
            "--capture=sys",
            "--hypothesis-seed=0",
            *chosen,
        ]
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
        if done.returncode:
            return done.returncode
    return 0


def run_tests(arguments) -> int:
    """In the process that has the sanitizers loaded."""
    import pytest

    sys.meta_path.insert(0, Finder())
    return pytest.main(arguments)


if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    sys.exit(run_tests(sys.argv[2:]) if sys.argv[1:2] == ["--tests"] else main(sys.argv[1:]))
