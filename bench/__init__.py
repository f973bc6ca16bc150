"""Timings against what users have today, each behind a parity check. Installed as `sparselottery.bench`.

registry.py   which cases there are           setups*.py    what each case runs: ours, baselines, the expected result
timing.py     interleaved rounds, one thread  verify.py     the parity gate
run.py        all of it, into one CSV         report.py     tables from a CSV
memory.py     bytes that training keeps
"""
