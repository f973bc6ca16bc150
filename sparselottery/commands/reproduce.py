from .common import Progress, run_arguments, say

HELP = "redo a figure of the papers and check its claims"
EXAMPLES = [
    "reproduce lenet --scale short --data-root data",
    "reproduce lenet --scale paper --data-root data --json",
]


def fill(parser):
    from ..experiments import reproduce

    parser.add_argument("figure", choices=sorted(reproduce.FIGURES), help="which figure of the papers")
    parser.add_argument("--scale", choices=reproduce.SCALES, default="smoke", help="how much of it (default smoke)")
    run_arguments(parser)


def run(arguments):
    from ..experiments import claims, reproduce

    result = reproduce.reproduce(
        arguments.figure,
        arguments.scale,
        arguments.out,
        data_root=arguments.data_root,
        workers=arguments.workers,
        progress=Progress(),
    )
    for claim in result["claims"]:
        say(arguments, claims.line(claim))
    say(arguments, f"figure: {result['png']}")
    return int(not all(claim["holds"] for claim in result["claims"])), result


def planned(arguments) -> dict:
    from ..experiments import reproduce

    return dict(reproduce.find(arguments.figure, arguments.scale).runs[arguments.scale])
