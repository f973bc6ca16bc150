"""tools/nvcc_gate.py: what it reads out of ptxas' report and when it is red."""

import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("nvcc_gate", Path(__file__).parents[1] / "tools" / "nvcc_gate.py")
gate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(gate)

REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_90'
ptxas info    : Function properties for first
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 64 bytes smem, 384 bytes cmem[0]
ptxas info    : Compiling entry function 'second' for 'sm_90'
ptxas info    : Function properties for second
    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 64 registers, used 0 barriers
"""


def test_parse():
    first, second = gate.parse(REPORT)
    assert first == {"name": "first", "registers": 32, "spills": 0, "shared": 64}
    assert second == {"name": "second", "registers": 64, "spills": 40, "shared": 0}
    with pytest.raises(ValueError, match="unknown form"):
        gate.parse("ptxas info    : Compiling entry function 'k' for 'sm_90'\n")


@pytest.mark.parametrize(
    "compiled, status, says",
    [
        (([], "error: expected a ;"), 1, "does not compile"),
        ((gate.parse(REPORT), ""), 1, "RED: spills"),
        ((gate.parse(REPORT)[:1], ""), 0, "all green"),
    ],
)
def test_status(monkeypatch, capsys, compiled, status, says):
    monkeypatch.setattr(gate, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(gate, "compile_file", lambda *_: compiled)
    assert gate.main(["--arch", "90"]) == status
    assert says in capsys.readouterr().out


def test_without_nvcc(monkeypatch, capsys):
    monkeypatch.setattr(gate, "find_nvcc", lambda: None)
    assert gate.main([]) == 2
    assert "nothing was checked" in capsys.readouterr().out
