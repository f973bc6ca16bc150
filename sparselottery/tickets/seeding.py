"""Random numbers that a job has for itself."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Every usual generator seeded inside (so that a fit that draws from one is repeatable), restored afterwards."""
    import numpy as np  # here: who seeds nothing needs only torch

    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
