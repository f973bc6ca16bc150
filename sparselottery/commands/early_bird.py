from .common import Progress, add_fields, given_fields, note, run_arguments, say

HELP = "draw Early-Bird tickets: masks that settle in the first epochs of training"
EXAMPLES = [
    "early-bird --data digits",
    "early-bird --data digits --density 0.3 --start drawn --round-to 8",
    "early-bird --data digits --model lenet-300-100 --structure unstructured --density 0.1",
    "early-bird --data cifar-10 --data-root data --model resnet-20 --lr 0.1 --budget 40ep --milestones 20ep,30ep "
    "--validation 5000 --evaluate-every 352 --seeds 1 --json",
]


def fill(parser):
    from ..experiments import hparams

    add_fields(parser, hparams.EarlyBird)
    run_arguments(parser)
    parser.add_argument("--no-report", action="store_true", help="leave out report.html and its figures")


def planned(arguments) -> dict:
    from ..experiments.hparams import EarlyBird

    return {"early-bird": EarlyBird(**given_fields(arguments, EarlyBird))}


def run(arguments):
    from .. import report
    from ..analysis import early_bird as analysis
    from ..experiments.hparams import EarlyBird
    from ..experiments.runs import run_early_bird

    chosen = EarlyBird(**given_fields(arguments, EarlyBird))
    result = run_early_bird(
        chosen, arguments.out, data_root=arguments.data_root, workers=arguments.workers, progress=Progress()
    )
    shown = result.to_json()
    say(arguments, "")
    say(arguments, report.text_table(*report.summary_rows(shown["levels"])))
    say(arguments, "\nmean ± half width of the 95 % confidence interval over seeds\n")
    say(arguments, report.verdict(shown))
    say(arguments, analysis.sentence(shown))
    if shown["cost"]["energy"]["source"] is None:
        note(f"no energy was measured: {shown['cost']['energy']['why_not']}")
    say(arguments, f"ticket: {shown['ticket']}")
    if not arguments.no_report:
        shown["report"] = str(report.write_report(result.run))
        say(arguments, f"report: {shown['report']}")
    return 0, shown
