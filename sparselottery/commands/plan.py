import argparse
import importlib

from .common import note, say

HELP = "what a command would cost on this machine, without running it"
EXAMPLES = [
    "plan imp --data mnist --data-root data --seeds 5",
    "plan reproduce conv2 --scale paper --data-root data --json",
]


def fill(parser):
    parser.add_argument("planned", metavar="COMMAND", choices=plannable(), help=f"one of {', '.join(plannable())}")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its own arguments")


def plannable() -> list[str]:
    """The commands that train: they tell which runs they are made of, with `planned(arguments) -> {label: hparams}`."""
    from . import COMMANDS

    return [name for name, file in COMMANDS.items() if hasattr(_module(file), "planned")]


def _module(file: str):
    return importlib.import_module(f".{file}", __package__)


def run(arguments):
    from ..experiments import cost
    from . import COMMANDS

    module = _module(COMMANDS[arguments.planned])
    prog = f"sparselottery plan {arguments.planned}"
    parser = argparse.ArgumentParser(prog=prog, description=module.HELP, exit_on_error=False, add_help=True)
    module.fill(parser)
    parser.add_argument("--json", action="store_true", default=arguments.json)
    try:
        asked, unknown = parser.parse_known_args(arguments.rest)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    if unknown:
        raise ValueError(f"{arguments.planned}: no such argument: {' '.join(unknown)}")
    arguments.json = asked.json
    costs = {}
    for label, hparams in module.planned(asked).items():
        note(f"{label}: measuring a few iterations ...")
        costs[label] = cost.cost(hparams, asked.data_root, asked.workers)
    total = cost.sum_of(list(costs.values()))
    for label, found in {**costs, **({"all": total} if len(costs) > 1 else {})}.items():
        say(
            arguments,
            f"{label}: {found['trainings']} trainings, {found['iterations']:,} iterations: about "
            f"{cost.in_words(found['seconds'])} ({cost.in_words(found['cpu_seconds'])} of one core), "
            f"{found['disk_bytes'] / 1e6:.3g} MB on disk",
        )
    command = [arguments.planned, *(a for a in arguments.rest if a != "--json")]
    return 0, {"command": " ".join(command), "runs": costs, **total}
