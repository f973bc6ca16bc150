"""The parity gate: a time counts only where the result agrees with the float64 reference in the same run.

    python bench/verify.py [topk linear conv step optim bitmask] [--device cpu|cuda] [--full]

prints one line per case and candidate and exits with 1 if one is red.
"""

import argparse
import dataclasses
import sys

import torch

from sparselottery.bench.timing import backend, exact_float32


@dataclasses.dataclass(frozen=True)
class Parity:
    """`error`: the largest difference, relative to the largest expected value; `ok`: it is within the tolerance."""

    ok: bool
    error: float


def compare(results, expected, tolerance: float) -> Parity:
    """Compares lists of tensors; a missing tensor, a wrong shape, NaN or inf out of place is an infinite error."""
    results, expected = list(results), list(expected)
    if len(results) != len(expected):
        return Parity(False, float("inf"))
    worst = 0.0
    for got, want in zip(results, expected, strict=True):
        if got.shape != want.shape:
            return Parity(False, float("inf"))
        if want.dtype == torch.bool:
            worst = max(worst, 0.0 if torch.equal(got.cpu(), want.cpu()) else float("inf"))
            continue
        difference = (got.to(want.device).double() - want.double()).abs()  # where they lie: a GPU's copies are slow
        scale = want.abs().max().item() if want.numel() else 0.0
        error = difference.max().item() / (scale or 1.0) if difference.numel() else 0.0
        worst = max(worst, error if error == error else float("inf"))
    return Parity(worst <= tolerance, worst)


def verify(work) -> dict[str, Parity]:
    """Parity of every candidate of a prepared case that says what it computes."""
    expected = work.expected()
    found = {}
    for name, candidate in work.candidates.items():
        if candidate.results is not None:
            with backend(candidate.backend):
                found[name] = compare(candidate.results(), expected, work.tolerance)
    return found


def main(argv=None) -> int:
    from sparselottery.bench import registry

    parser = argparse.ArgumentParser(description="Checks every case of the benchmark against the float64 reference.")
    parser.add_argument("op", nargs="*", choices=[*registry.OPS, []], help="default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--full", action="store_true", help="the large cases too")
    parser.add_argument("--small", action="store_true", help="tiny cases of every op instead")
    arguments = parser.parse_args(argv)
    red = 0
    cases = registry.select(arguments.op, device=arguments.device, full=arguments.full)
    if arguments.small:
        cases = [
            dataclasses.replace(case, device=arguments.device)
            for case in registry.small_cases()
            if arguments.device == "cpu" or case.op not in registry.CPU_ONLY
        ]
    for case in cases:
        with exact_float32():
            parities = verify(case.prepare())
        for name, parity in parities.items():
            red += not parity.ok
            print(
                f"{'green' if parity.ok else 'RED  '} {case.op} {case.name} {name}: error {parity.error:.2g}",
                flush=True,
            )
    print(f"{red} red")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
