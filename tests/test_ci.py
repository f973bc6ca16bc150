""".ci/run: its last line."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CASES = """
def test_passes(): pass
def test_fails(): assert False
def test_is_skipped(): __import__("pytest").skip("no GPU")
def test_setup(missing_fixture): pass
"""
TEARDOWN = """
import pytest
@pytest.fixture
def broken():
    yield
    raise RuntimeError("teardown")
def test_passes_but_does_not_clean_up(broken): pass
def test_fails_and_does_not_clean_up(broken): assert False
def test_passes(): pass
"""


def summary(folder):
    """What the function `summary` of .ci/run prints for the JUnit files in a folder, and its exit status."""
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    start = lines.index("summary() {")
    function = "\n".join(lines[start : lines.index("}", start) + 1])
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.unlink(missing_ok=True)
    python.symlink_to(sys.executable)
    script = f'scratch="$PWD"\n{function}\nsummary'
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True)
    return done.stdout, done.returncode


def test_summary_counts_errors_as_failures(tmp_path):
    assert summary(tmp_path) == ("0 passed, 0 failed, 0 skipped\n", 1)
    for name, text in (("a", CASES), ("b", TEARDOWN), ("c", "import nothing_of_that_name")):
        path = tmp_path / f"test_{name}.py"
        path.write_text(text)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={tmp_path}/{name}.xml"]
        subprocess.run([*command, "--rootdir", tmp_path, path], cwd=tmp_path, capture_output=True)
    # a: 1 passed, 1 failed, 1 error, 1 skipped. b: 1 passed, an error after a pass, a failure and an error after it.
    # c: an error in collection.
    assert summary(tmp_path) == ("2 passed, 6 failed, 1 skipped\n", 0)
