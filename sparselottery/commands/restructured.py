"""What `refill` and `regroup` share."""

from pathlib import Path

from .common import count, list_of, note, say


def fill(parser, how: str) -> None:
    parser.add_argument("folder", metavar="RUN", type=Path, help="the folder of a finished run of imp or one-shot")
    parser.add_argument("--level", type=count, metavar="N", help="which tickets (default: those the run has found)")
    parser.add_argument("--exclude", type=list_of(str), metavar="A,B,..", help="layers that stay (default: the output)")
    if how == "regroup":
        parser.add_argument(
            "--structure", default="block:16x16", metavar="block:RxC", help="size of the blocks (default block:16x16)"
        )
    parser.add_argument("--data-root", metavar="DIR", help="folder with mnist/, fashion-mnist/, cifar-10-batches-bin/")
    parser.add_argument("--workers", type=count, metavar="N", help="trainings at the same time (default: one per core)")


def run_restructured(arguments, how: str) -> tuple[int, dict]:
    from ..experiments.restructure import restructure
    from ..tickets.driver import cores

    found = restructure(
        arguments.folder,
        how,
        structure=getattr(arguments, "structure", "channel"),
        exclude=arguments.exclude,
        level=arguments.level,
        data_root=arguments.data_root,
        workers=cores() if arguments.workers is None else arguments.workers,
        tell=note,
    )
    new, old = found["test_accuracy"], found["unstructured"]
    say(
        arguments,
        f"{found['structure']}: {100 * found['density']:.1f} % of the weights, {100 * found['covered']:.1f} % of the old "
        f"survivors among them ({100 * found['by_chance']:.1f} % by chance): {_percent(new)} test accuracy; the unstructured "
        f"ticket with {100 * old['density']:.1f} %: {_percent(old['test_accuracy'])}",
    )
    say(arguments, f"ticket: {found['ticket']}")
    return 0, found


def _percent(statistic: dict) -> str:
    half = "" if statistic["ci95"] is None else f" ± {100 * statistic['ci95']:.2f}"
    return f"{100 * statistic['mean']:.2f}{half} %"
