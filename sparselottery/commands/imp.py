from .common import given_fields
from .drivers import driver_arguments, run_driver

HELP = "find a lottery ticket by iterative magnitude pruning"
EXAMPLES = [
    "imp --data digits --seeds 5 --rounds 15",
    "imp --data mnist --data-root data --rewind 500it --controls reinit,shuffle",
    "imp --data cifar-10 --data-root data --model resnet-20 --scope global --output-factor 0 --json",
]


def fill(parser):
    from ..experiments import hparams

    driver_arguments(parser, hparams.Imp)


def run(arguments):
    from ..experiments import hparams, runs

    return run_driver(arguments, hparams.Imp, runs.run_imp)


def planned(arguments) -> dict:
    from ..experiments import hparams

    return {"imp": hparams.Imp(**given_fields(arguments, hparams.Imp))}
