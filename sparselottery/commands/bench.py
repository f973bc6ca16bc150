from .common import say

HELP = "measure the ops against dense torch and their other rivals"
EXAMPLES = ["bench topk", "bench linear --json"]


def fill(parser):
    parser.add_argument("op", nargs="*", metavar="OP", help="topk, linear, conv, step, optim or bitmask (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default cpu)")
    parser.add_argument("--full", action="store_true", help="the large cases too")


def run(arguments):
    from ..bench.run import run as measure

    result = measure(
        arguments.op, device=arguments.device, full=arguments.full, progress=lambda text: say(arguments, text)
    )
    sound = not result["failures"] and all(row["parity"] for row in result["rows"])
    return int(not sound), result
