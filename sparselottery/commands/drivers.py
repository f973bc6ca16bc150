"""What `imp` and `one-shot` share."""

from .common import Progress, add_fields, count, given_fields, note, run_arguments, say


def driver_arguments(parser, hparams: type) -> None:
    """An option for every hyperparameter, and those that every run has."""
    add_fields(parser, hparams)
    run_arguments(parser)
    parser.add_argument(
        "--replicas",
        type=count,
        metavar="N",
        help="train so many networks of a level at once, as a batch axis in one process (default: 1 on a CPU)",
    )
    parser.add_argument("--no-speed", action="store_true", help="leave out the measurement of speed at the end")
    parser.add_argument("--no-report", action="store_true", help="leave out report.html and its figures")


def run_driver(arguments, hparams: type, run) -> tuple[int, dict]:
    """Do a run, or go on with it, and tell of it."""
    chosen = hparams(**given_fields(arguments, hparams))
    options = {name: getattr(arguments, name) for name in ("data_root", "workers", "replicas")}
    result = run(chosen, arguments.out, **options, progress=Progress())
    return 0, _conclude(arguments, result, chosen)


def _conclude(arguments, result, hparams) -> dict:
    """What follows every finished run: its table, the speed of the ticket found, its report. Returns the JSON object."""
    from .. import report
    from ..experiments.speed import speed_of_run

    shown = result.to_json()
    if not arguments.no_speed:
        note("measuring the ticket's speed against the dense network ...")
        shown["speed"] = speed_of_run(result, hparams, arguments.data_root)
    say(arguments, "")
    say(arguments, report.text_table(*report.summary_rows(shown["levels"])))
    say(arguments, "\nmean ± half width of the 95 % confidence interval over seeds\n")
    say(arguments, report.verdict(shown))
    speed = report.speed_sentence(shown.get("speed"))
    if speed:
        say(arguments, speed)
    say(arguments, f"ticket: {shown['ticket']}")
    if not arguments.no_report:
        shown["report"] = str(report.write_report(result.run))
        say(arguments, f"report: {shown['report']}")
    return shown
