from .common import Progress, add_fields, given_fields, run_arguments, say

HELP = "find tickets of whole neurons by mutual information, beside other ways to choose as many"
EXAMPLES = [
    "mutual-information --data digits --density 0.1",
    "mutual-information --data digits --model conv-bn-4 --density 0.25 --scope global --seeds 3",
    "mutual-information --data mnist --data-root data --budget 5000it --validation 5000 --json",
]


def fill(parser):
    from ..experiments import hparams

    add_fields(parser, hparams.MutualInformation)
    run_arguments(parser)
    parser.add_argument("--no-report", action="store_true", help="leave out report.html and its figures")


def run(arguments):
    from .. import report
    from ..analysis import mutual_information as analysis
    from ..experiments.hparams import MutualInformation
    from ..experiments.mutual_information import run_mutual_information

    chosen = MutualInformation(**given_fields(arguments, MutualInformation))
    shown = run_mutual_information(
        chosen, arguments.out, data_root=arguments.data_root, workers=arguments.workers, progress=Progress()
    )
    say(arguments, "")
    say(arguments, report.text_table(*analysis.rows(shown)))
    say(arguments, "\nmean ± half width of the 95 % confidence interval over seeds\n")
    say(arguments, shown["verdict"])
    say(arguments, f"run: {shown['run']}")
    if not arguments.no_report:
        shown["report"] = str(report.write_report(shown["run"]))
        say(arguments, f"report: {shown['report']}")
    return 0, shown


def planned(arguments) -> dict:
    from ..experiments.hparams import MutualInformation

    return {"mutual-information": MutualInformation(**given_fields(arguments, MutualInformation))}
