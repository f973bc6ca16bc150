# The interpreter's tests need a process of their own: `pytest tests/triton` runs them, `pytest tests` leaves them out.
collect_ignore = ["triton"]
