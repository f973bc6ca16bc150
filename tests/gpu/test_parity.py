"""Every op on a GPU, on each backend that can run it, against the float64 reference. Run by bench/gpu.sh."""

import dataclasses

import pytest
import torch

from sparselottery.bench import registry, verify

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SMALL = registry.small_cases()
HALF = [dataclasses.replace(case, dtype="bfloat16") for case in SMALL if case.op in ("topk", "linear", "conv")]
CASES = [dataclasses.replace(case, device="cuda") for case in SMALL + HALF] + registry.select(device="cuda")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.name} {case.density:g}")
def test_results_agree_with_the_reference(case):
    parities = verify.verify(case.prepare())
    assert "auto" in parities and all(p.ok for p in parities.values()), parities


@pytest.mark.parametrize("case", CASES[: len(SMALL)], ids=lambda case: f"{case.op} {case.name}")
def test_work_is_done_on_the_current_stream(case):
    """Behind a long-running kernel on a stream of its own, nothing may read inputs before that stream gets there."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work = case.prepare()
        torch.cuda._sleep(50_000_000)
        parities = verify.verify(work)
    stream.synchronize()
    assert all(p.ok for p in parities.values()), parities
