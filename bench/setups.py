"""What each case runs (setups_*.py): ours, the baselines, and the expected result in float64.

Candidates that carry `ours` are the package: "auto" is what a user gets (dense is among its choices), the others are
one backend forced. All candidates of a case share their inputs, drawn from a fixed seed.
"""

from sparselottery.bench.setups_layers import conv, linear
from sparselottery.bench.setups_masks import bitmask, topk
from sparselottery.bench.setups_packed import packed
from sparselottery.bench.setups_replicas import replicas
from sparselottery.bench.setups_resident import resident
from sparselottery.bench.setups_steps import optim, step

SETUPS = {
    "topk": topk,
    "linear": linear,
    "conv": conv,
    "step": step,
    "optim": optim,
    "bitmask": bitmask,
    "packed": packed,
    "replicas": replicas,
    "resident": resident,
}
