from pathlib import Path

from .common import count, note, number, say

HELP = "ask what a ticket is like: weight motion, class damage, loss landscape, stability"
EXAMPLES = [
    "analyze runs/demo",
    "analyze runs/demo class-damage stability --level 12",
    "analyze runs/demo landscape --resolution 31 --examples 2000 --json",
]


def fill(parser):
    from ..experiments.analyses import RUNNERS, Settings

    defaults = Settings()
    parser.add_argument("folder", metavar="RUN", type=Path, help="the folder of a finished run")
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"any of {', '.join(RUNNERS)} (default: all)")
    parser.add_argument("--level", type=count, metavar="N", help="which ticket (default: the one the run has found)")
    parser.add_argument("--data-root", metavar="DIR", help="folder with mnist/, fashion-mnist/, cifar-10-batches-bin/")
    parser.add_argument("--workers", type=count, metavar="N", help="trainings at the same time (default: one per core)")
    parser.add_argument("--again", action="store_true", help="compute what is there already, too")
    about = parser.add_argument_group("landscape")
    about.add_argument("--seed", type=int, metavar="N", help="whose networks (default: the run's first seed)")
    about.add_argument("--examples", type=count, metavar="N", default=defaults.examples,
                       help="training examples the loss is taken on (default %(default)s)")  # fmt: skip
    about.add_argument("--resolution", type=count, metavar="N", default=defaults.resolution,
                       help="points along each side, odd (default %(default)s)")  # fmt: skip
    about.add_argument("--extent", type=number, metavar="X", default=defaults.extent,
                       help="how far each way, in norms of the filters (default %(default)s)")  # fmt: skip
    about.add_argument("--directions", type=int, metavar="SEED", default=defaults.directions,
                       help="seed of the two directions (default %(default)s)")  # fmt: skip


def run(arguments):
    from dataclasses import fields

    from .. import analysis, report
    from ..experiments.analyses import Settings, analyze
    from ..tickets.driver import cores
    from ..tickets.ticket import write_atomic

    settings = Settings(**{f.name: getattr(arguments, f.name) for f in fields(Settings)})
    found = analyze(
        arguments.folder,
        arguments.names,
        settings,
        data_root=arguments.data_root,
        workers=cores() if arguments.workers is None else arguments.workers,
        again=arguments.again,
        tell=note,
    )
    for name, about in found["analyses"].items():
        about["figures"] = []
        for figure in analysis.figures(name, analysis.read(arguments.folder, name)["numbers"]):
            path = Path(about["path"]).with_name(f"{figure.name}.png")
            write_atomic(path, figure.png)
            about["figures"].append(str(path))
            say(
                arguments,
                f"\n{figure.title}\n{figure.caption}\n{report.text_table(figure.header, figure.rows)}\n{path}",
            )
    return 0, found
