"""What the commands share: arguments from dataclasses, progress, where text goes."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import time
import types
import typing


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


# ---- values of arguments ----


def list_of(item):
    def parse(text: str) -> tuple:
        return tuple(item(part) for part in text.split(",") if part)

    parse.__name__ = f"list of {item.__name__}"  # argparse says "invalid ... value"
    return parse


def number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return number


def count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
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
            item = number if item is float else item
            settings["type"] = list_of(item)
            settings["metavar"] = "A,B,.."
        else:
            settings["type"] = {int: int, float: number}.get(kind, str)
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


def run_arguments(parser) -> None:
    parser.add_argument("--data-root", metavar="DIR", help="folder with mnist/, fashion-mnist/, cifar-10-batches-bin/")
    parser.add_argument("--out", metavar="DIR", default="runs", help="where run folders are made (default runs)")
    parser.add_argument("--workers", type=count, metavar="N", help="trainings at the same time (default: one per core)")


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
