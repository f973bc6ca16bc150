from .restructured import fill as _fill
from .restructured import run_restructured

HELP = "turn the tickets of a run into dense blocks of reordered rows and columns, and train them"
EXAMPLES = ["regroup runs/demo", "regroup runs/demo --level 5 --structure block:8x8 --exclude fc2,output"]


def fill(parser):
    _fill(parser, "regroup")


def run(arguments):
    return run_restructured(arguments, "regroup")
