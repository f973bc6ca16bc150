"""For all tests."""

import sys
from pathlib import Path

# These need a process of their own: `pytest tests/triton` and `make sanitize` run them, `pytest tests` leaves them out.
collect_ignore = ["triton", "sanitize"]

# `python -m pytest` puts the repository's root on sys.path, where transformers would take kernels/ for Hugging Face's
# package of that name.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
