"""The README's example runs as it stands, and its tables are those that their command writes."""

import re
import subprocess
import sys
from pathlib import Path

from sparselottery.bench import report

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_runs(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    check = "\nassert sum(int((m.weight != 0).sum()) for m in (model[0], model[2])) == round(0.2 * 238200)"
    run = subprocess.run([sys.executable, "-c", example + check], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "ticket.safetensors").exists() and "density" in run.stdout


def test_every_command_of_the_readme_exists():
    from sparselottery.commands import COMMANDS

    commands = README.split("## Commands")[1].split("```")[1]
    named = set(re.findall(r"^sparselottery ([a-z-]+)", commands, flags=re.M))
    assert named and named <= set(COMMANDS)


def test_the_tables_are_what_their_command_writes(tmp_path):
    """From bench/results/, CPU and GPU: nothing between the markers is written by hand, nor out of date."""
    for begin_and_end in report.MARKERS.values():
        assert [README.count(marker) for marker in begin_and_end] == [1, 1]
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "results").symlink_to(ROOT / "bench" / "results")
    report.readme([], tmp_path)
    assert (tmp_path / "README.md").read_text() == README
    assert ("GPU: not yet measured" in README) != (ROOT / "bench" / "results" / "gpu.csv").exists()
