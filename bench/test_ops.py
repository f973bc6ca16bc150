"""pytest-benchmark entry points: `pytest bench`.

Each case checks parity before anything is timed; candidates of one case share a group, so that pytest-benchmark's table
compares them. For figures to quote use run.py, which interleaves the candidates.
"""

import pytest

from sparselottery.bench import registry, timing, verify

CASES = [
    pytest.param(case, id=f"{case.op}-{case.name}-{case.density:g}".replace(" ", "_")) for case in registry.select()
]


@pytest.mark.parametrize("case", CASES)
def test_parity(case):
    parities = verify.verify(case.prepare())
    assert "auto" in parities and all(p.ok for p in parities.values()), parities


@pytest.mark.parametrize("role", ["ours", "first baseline"])
@pytest.mark.parametrize("case", CASES)
def test_speed(benchmark, case, role):
    work = case.prepare()
    name = next(n for n, c in work.candidates.items() if c.ours == (role == "ours"))
    parities = verify.verify(work)
    assert parities["auto"].ok, f"{case.name}: no time without parity, error {parities['auto'].error}"
    benchmark.group = f"{case.op} {case.name} density {case.density:g}"
    benchmark.extra_info.update(candidate=name, error=parities["auto"].error)
    candidate = work.candidates[name]
    with timing.pinned(), timing.backend(candidate.backend):
        candidate.run(0)
        benchmark(candidate.run, 0)
