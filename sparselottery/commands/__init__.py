"""The commands of `sparselottery`, one module each: HELP, EXAMPLES, fill(parser), run(arguments) -> (exit status, JSON object).

`fill` and `run` import what they need when they are called: `sparselottery env` must work where half the package cannot.
"""

COMMANDS = {  # command -> module here, in the order of --help
    "imp": "imp",
    "one-shot": "one_shot",
    "early-bird": "early_bird",
    "mutual-information": "mutual_information",
    "supermask": "supermask",
    "refill": "refill",
    "regroup": "regroup",
    "reproduce": "reproduce",
    "plan": "plan",
    "bench": "bench",
    "analyze": "analyze",
    "report": "report",
    "env": "env",
}
