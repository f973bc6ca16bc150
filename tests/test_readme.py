"""The README's example runs as it stands, and its table is between the markers that its command writes to."""

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


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


def test_the_table_has_its_markers():
    assert README.count("<!-- bench:begin -->") == 1 and README.count("<!-- bench:end -->") == 1
