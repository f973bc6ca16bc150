from .common import given_fields
from .drivers import driver_arguments, run_driver

HELP = "find lottery tickets by pruning once to each density"
EXAMPLES = [
    "one-shot --data digits --densities 0.5,0.2,0.1",
    "one-shot --data mnist --data-root data --seeds 3 --json",
]


def fill(parser):
    from ..experiments import hparams

    driver_arguments(parser, hparams.OneShot)


def run(arguments):
    from ..experiments import hparams, runs

    return run_driver(arguments, hparams.OneShot, runs.run_one_shot)


def planned(arguments) -> dict:
    from ..experiments import hparams

    return {"one-shot": hparams.OneShot(**given_fields(arguments, hparams.OneShot))}
