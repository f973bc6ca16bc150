"""The command line: `sparselottery COMMAND`, the same as `python -m sparselottery COMMAND`.

Every command takes `--json` (one JSON object as the last line of standard output, everything else on standard error) and
ends with a one-line error and exit status 2 on a user's mistake; SPARSELOTTERY_DEBUG=1 shows the traceback as well.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import warnings

from .commands import COMMANDS
from .commands.common import note

PROGRAM = "sparselottery"
USER_MISTAKE = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(USER_MISTAKE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status (0 done, 1 a claim or check failed, 2 a user's mistake, 130 interrupted)."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by whoever started us: print would take the other one instead
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        try:
            arguments = _build_parser(argv).parse_args(argv)
        except SystemExit:  # after --help or a mistake
            sys.stdout.flush()
            raise
        return _run(arguments)
    except KeyboardInterrupt:  # while a command's modules were imported
        note(f"{PROGRAM}: interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has gone (| head): nobody left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(arguments) -> int:
    name = f"{PROGRAM} {arguments.command}"
    try:
        with warnings.catch_warnings():  # people of a command line want the sentence, not the line of code
            warnings.showwarning = lambda message, *where, **more: note(f"{name}: warning: {message}")
            status, result = arguments.run(arguments)
        if arguments.json:
            print(json.dumps(result, allow_nan=False), flush=True)
        return status
    except KeyboardInterrupt:
        note(f"{name}: interrupted; what was finished is kept, the same command resumes")
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if os.environ.get("SPARSELOTTERY_DEBUG"):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        note(f"{name}: error: {text}")
        return USER_MISTAKE


def _build_parser(argv: list[str]) -> argparse.ArgumentParser:
    asked = next((a for a in argv if not a.startswith("-")), None)
    parser = _Parser(prog=PROGRAM, description="Find lottery tickets and make them fast.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, file in COMMANDS.items():
        module = importlib.import_module(f".commands.{file}", __package__)
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog="examples:\n" + "\n".join(f"  {PROGRAM} {e}" for e in module.EXAMPLES),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == asked:  # the others' arguments would import half the package, and `env` must work when that fails
            module.fill(command)
        command.add_argument("--json", action="store_true", help="one JSON object as the last line of standard output")
        command.set_defaults(run=module.run)
    return parser
