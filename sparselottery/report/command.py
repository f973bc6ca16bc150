"""The command that makes a run."""

import shlex
import textwrap


def command_of(config: dict) -> str:
    """The command that makes the run of a `config.json`, every setting spelled out so that later defaults change nothing."""
    words = ["sparselottery", config["driver"]]
    for name, value in config["hparams"].items():
        option = f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
            continue
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words.append(f"{option} {shlex.quote(text)}")
    text = textwrap.fill(" ".join(words), 100, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False)
    return text.replace("\n", " \\\n")
