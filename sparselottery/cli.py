"""The command line: `sparselottery COMMAND`, the same as `python -m sparselottery COMMAND`.

Every command takes `--json` (one JSON object as the last line of standard output, everything else on standard error) and
ends with a one-line error and exit status 2 on a user's mistake; SPARSELOTTERY_DEBUG=1 shows the traceback as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
import types
import typing
from pathlib import Path

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
    for name, add in _COMMANDS.items():
        help_text, examples, fill, run = add()
        command = commands.add_parser(
            name,
            help=help_text,
            description=help_text,
            epilog="examples:\n" + "\n".join(f"  {PROGRAM} {e}" for e in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == asked:  # the others' arguments would import half the package, and `env` must work when that fails
            fill(command)
        command.add_argument("--json", action="store_true", help="one JSON object as the last line of standard output")
        command.set_defaults(run=run)
    return parser


def say(arguments, text: str) -> None:
    """Print for people: on standard output, or on standard error where that is kept for JSON."""
    if arguments.json:
        note(text)
    else:
        print(text, flush=True)


def note(text: str, stream=None, end: str = "\n") -> None:
    """Print on standard error. That nobody reads it any more is no reason to stop the work."""
    stream = stream or sys.stderr
    try:
        print(text, end=end, file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _list_of(item):
    def parse(text: str) -> tuple:
        return tuple(item(part) for part in text.split(",") if part)

    parse.__name__ = f"list of {item.__name__}"  # argparse says "invalid ... value"
    return parse


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return number


# ---- arguments from hyperparameter dataclasses ----


def add_fields(parser: argparse.ArgumentParser, hparams: type, skip: tuple[str, ...] = ()) -> None:
    """One option per dataclass field; help and choices come from the field's metadata."""
    hints = typing.get_type_hints(hparams)
    for field in dataclasses.fields(hparams):
        if field.name in skip:
            continue
        kind = hints[field.name]
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            kind = next(a for a in typing.get_args(kind) if a is not type(None))
        option = "--" + field.name.replace("_", "-")
        settings: dict = {"default": None, "help": _help(field), "dest": field.name}
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            item = _number if item is float else item
            settings["type"] = _list_of(item)
            settings["metavar"] = "A,B,.."
        else:
            settings["type"] = {int: int, float: _number}.get(kind, str)
            settings["metavar"] = field.metadata.get("metavar", field.name.upper())
        if "choices" in field.metadata and kind is not bool and typing.get_origin(kind) is not tuple:
            settings["choices"] = list(field.metadata["choices"])
            settings.pop("metavar", None)
        parser.add_argument(option, **settings)


def _help(field) -> str:
    text = field.metadata.get("help", "")
    default = field.default
    if default is None or default is dataclasses.MISSING:
        return text.replace("%", "%%")
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{text} (default {shown})".replace("%", "%%")


def given_fields(arguments: argparse.Namespace, hparams: type) -> dict:
    """What the user typed of a dataclass's fields; the rest keeps the defaults of the preset."""
    names = [f.name for f in dataclasses.fields(hparams)]
    return {n: getattr(arguments, n) for n in names if getattr(arguments, n, None) is not None}


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return count


class Progress:
    """Shows a driver's events on standard error: one live line on a terminal, else a line now and then."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.begin = self.shown = time.monotonic()
        self.already = 0

    def __call__(self, event: dict) -> None:
        if event["event"] == "waiting":
            return self._line(f"{event['run']}: another process works on this run, waiting for it", keep=True)
        done, total = event["done"], event["total"]
        now = time.monotonic()
        if event["event"] == "start":
            self.begin, self.already = now, done
            found = f", {done} of them done before" if done else ""
            return self._line(f"{event['run']}: {total} trainings{found}", keep=True)
        last = done == total
        if not (self.live or last or now - self.shown > 10):
            return None
        self.shown = now
        left = (now - self.begin) / max(1, done - self.already) * (total - done)
        accuracy = event.get("test_accuracy")
        what = f"seed {event['seed']}, {100 * event['density']:.1f} % {event['kind']}"
        what += f": {100 * accuracy:.2f} % test accuracy" if accuracy is not None else ""
        return self._line(f"[{done}/{total}] about {left:.0f} s left; {what}", keep=last)

    def _line(self, text: str, keep: bool) -> None:
        if self.live:
            note(f"\r\x1b[K{text}", self.stream, "\n" if keep else "")
        else:
            note(text, self.stream)


# ---- imp, one-shot, reproduce ----


def _run_arguments(parser) -> None:
    parser.add_argument("--data-root", metavar="DIR", help="folder with mnist/, fashion-mnist/, cifar-10-batches-bin/")
    parser.add_argument("--out", metavar="DIR", default="runs", help="where run folders are made (default runs)")
    parser.add_argument(
        "--workers", type=_count, metavar="N", help="trainings at the same time (default: one per core)"
    )


def _driver_arguments(parser, hparams: type) -> None:
    add_fields(parser, hparams)
    _run_arguments(parser)
    parser.add_argument("--no-speed", action="store_true", help="leave out the measurement of speed at the end")
    parser.add_argument("--no-report", action="store_true", help="leave out report.html and its figures")


def _run_driver(arguments, hparams: type, run) -> tuple[int, dict]:
    chosen = hparams(**given_fields(arguments, hparams))
    result = run(chosen, arguments.out, data_root=arguments.data_root, workers=arguments.workers, progress=Progress())
    return 0, _conclude(arguments, result, chosen)


def _conclude(arguments, result, hparams) -> dict:
    """What follows every finished run: its table, the speed of the ticket found, its report. Returns the JSON object."""
    from . import report
    from .experiments.speed import speed_of_run

    shown = result.to_json()
    if not arguments.no_speed:
        note("measuring the ticket's speed against the dense network ...")
        shown["speed"] = speed_of_run(result, hparams, arguments.data_root)
    say(arguments, "")
    say(arguments, report.text_table(*report.summary_rows(shown["levels"])))
    say(arguments, "\nmean ± half width of the 95 % confidence interval over seeds\n")
    say(arguments, report.verdict(shown))
    speed = report.speed_sentence(shown.get("speed"))
    if speed:
        say(arguments, speed)
    say(arguments, f"ticket: {shown['ticket']}")
    if not arguments.no_report:
        shown["report"] = str(report.write_report(result.run))
        say(arguments, f"report: {shown['report']}")
    return shown


def _imp():
    def fill(parser):
        from .experiments import hparams

        _driver_arguments(parser, hparams.Imp)

    def run(arguments):
        from .experiments import hparams, runs

        return _run_driver(arguments, hparams.Imp, runs.run_imp)

    examples = [
        "imp --data digits --seeds 5 --rounds 15",
        "imp --data mnist --data-root data --rewind 500it --controls reinit,shuffle",
        "imp --data cifar-10 --data-root data --model resnet-20 --scope global --output-factor 0 --json",
    ]
    return "find a lottery ticket by iterative magnitude pruning", examples, fill, run


def _one_shot():
    def fill(parser):
        from .experiments import hparams

        _driver_arguments(parser, hparams.OneShot)

    def run(arguments):
        from .experiments import hparams, runs

        return _run_driver(arguments, hparams.OneShot, runs.run_one_shot)

    examples = [
        "one-shot --data digits --densities 0.5,0.2,0.1",
        "one-shot --data mnist --data-root data --seeds 3 --json",
    ]
    return "find lottery tickets by pruning once to each density", examples, fill, run


def _reproduce():
    def fill(parser):
        from .experiments import reproduce

        parser.add_argument("figure", choices=sorted(reproduce.FIGURES), help="which figure of the papers")
        parser.add_argument("--scale", choices=reproduce.SCALES, default="smoke", help="how much of it (default smoke)")
        _run_arguments(parser)

    def run(arguments):
        from .experiments import reproduce

        result = reproduce.reproduce(
            arguments.figure,
            arguments.scale,
            arguments.out,
            data_root=arguments.data_root,
            workers=arguments.workers,
            progress=Progress(),
        )
        for claim in result["claims"]:
            say(arguments, reproduce.line(claim))
        say(arguments, f"figure: {result['png']}")
        return int(not all(claim["holds"] for claim in result["claims"])), result

    examples = [
        "reproduce lenet --scale short --data-root data",
        "reproduce lenet --scale paper --data-root data --json",
    ]
    return "redo a figure of the papers and check its claims", examples, fill, run


# ---- bench, report, env ----


def _env():
    def run(arguments):
        from ._ext import env_report, format_env

        report = env_report()
        say(arguments, format_env(report))
        return 0, report

    return "what is installed, what is missing, and why", ["env", "env --json"], lambda parser: None, run


def _report():
    def fill(parser):
        parser.add_argument("folder", metavar="RUN", type=Path, help="the folder of a finished run")

    def run(arguments):
        from .report import write_report

        path = write_report(arguments.folder)
        say(arguments, f"report: {path}")
        figures = sorted(str(p) for p in arguments.folder.glob("*.png"))
        return 0, {"run": str(arguments.folder), "report": str(path), "figures": figures}

    return "write report.html and its figures for a run", ["report runs/demo"], fill, run


def _bench():
    def fill(parser):
        parser.add_argument(
            "op", nargs="*", metavar="OP", help="topk, linear, conv, step, optim or bitmask (default: all)"
        )
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default cpu)")
        parser.add_argument("--full", action="store_true", help="the large cases too")

    def run(arguments):
        from .bench.run import run as measure

        result = measure(
            arguments.op, device=arguments.device, full=arguments.full, progress=lambda text: say(arguments, text)
        )
        sound = not result["failures"] and all(row["parity"] for row in result["rows"])
        return int(not sound), result

    return (
        "measure the ops against dense torch and their other rivals",
        ["bench topk", "bench linear --json"],
        fill,
        run,
    )


_COMMANDS = {
    "imp": _imp,
    "one-shot": _one_shot,
    "reproduce": _reproduce,
    "bench": _bench,
    "report": _report,
    "env": _env,
}
