from .restructured import fill as _fill
from .restructured import run_restructured

HELP = "turn the tickets of a run into whole channels, and train them"
EXAMPLES = ["refill runs/demo", "refill runs/demo --level 5"]


def fill(parser):
    _fill(parser, "refill")


def run(arguments):
    return run_restructured(arguments, "refill")
