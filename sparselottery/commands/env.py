from .common import say

HELP = "what is installed, what is missing, and why"
EXAMPLES = ["env", "env --json"]


def fill(parser):
    """No arguments of its own."""


def run(arguments):
    from .._ext import env_report, format_env

    report = env_report()
    say(arguments, format_env(report))
    return 0, report
