from pathlib import Path

from .common import say

HELP = "write report.html and its figures for a run"
EXAMPLES = ["report runs/demo"]


def fill(parser):
    parser.add_argument("folder", metavar="RUN", type=Path, help="the folder of a finished run")


def run(arguments):
    from ..report import write_report

    path = write_report(arguments.folder)
    say(arguments, f"report: {path}")
    figures = sorted(str(p) for place in (".", "analysis") for p in (arguments.folder / place).glob("*.png"))
    return 0, {"run": str(arguments.folder), "report": str(path), "figures": figures}
