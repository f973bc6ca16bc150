from .common import Progress, add_fields, given_fields, run_arguments, say

HELP = "learn masks over weights that are never trained, and compare them with masks from a trained network"
EXAMPLES = [
    "supermask --data digits",
    "supermask --data mnist --data-root data --rescale --seeds 3",
    "supermask --data digits --method edge-popup --density 0.3 --mask-lr 0.01 --json",
]


def fill(parser):
    from ..experiments import hparams

    add_fields(parser, hparams.Supermask)
    run_arguments(parser)
    parser.add_argument("--no-report", action="store_true", help="leave out report.html and its figures")


def run(arguments):
    from .. import report
    from ..analysis import supermask as analysis
    from ..experiments.hparams import Supermask
    from ..experiments.supermask import run_supermask

    chosen = Supermask(**given_fields(arguments, Supermask))
    result = run_supermask(
        chosen, arguments.out, data_root=arguments.data_root, workers=arguments.workers, progress=Progress()
    )
    shown = result.to_json()
    say(arguments, "")
    say(arguments, report.text_table(*analysis.rows(shown)))
    say(arguments, "\nmean ± half width of the 95 % confidence interval over seeds\n")
    say(arguments, analysis.verdict(shown))
    say(arguments, f"ticket: {shown['ticket']}")
    if not arguments.no_report:
        shown["report"] = str(report.write_report(result.run))
        say(arguments, f"report: {shown['report']}")
    return 0, shown


def planned(arguments) -> dict:
    from ..experiments.hparams import Supermask

    return {"supermask": Supermask(**given_fields(arguments, Supermask))}
