"""tools/codegen.py: the table of what compilers made of the kernels, from their reports."""

import importlib.util
import sys
from pathlib import Path

import pytest

from sparselottery import kernels

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture
def codegen(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(TOOLS), *sys.path])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    spec = importlib.util.spec_from_file_location("codegen", TOOLS / "codegen.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.nvcc_gate, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(kernels, "AVAILABLE", True)
    return module


def kernel(name="tiles<3, 8>", spills=0, tensor=("HMMA",)):
    counts = None if tensor is None else dict.fromkeys(tensor, 64)
    return {"symbol": "_Z", "name": name, "registers": 128, "spills": spills, "shared": 16, "tensor": counts}


@pytest.fixture
def compilers(codegen, monkeypatch):
    """Stands in for both; returns what they answer, to be changed."""
    from sparselottery.kernels import aot

    row = dict(zip(aot.COLUMNS, ("linear", "a | b", "sm_90", 90, 0, 4096, 0, 32, "ok"), strict=True))
    answers = {"cuda": [("decode.cu", "90a", [kernel()], "")], "triton": [row]}
    monkeypatch.setattr(codegen.nvcc_gate, "check", lambda nvcc, archs: answers["cuda"])
    monkeypatch.setattr(aot, "modules", lambda: ["linear"])
    monkeypatch.setattr(aot, "run", lambda names, archs, jobs: answers["triton"])
    return answers


def test_the_file_has_a_row_for_every_kernel(codegen, compilers, tmp_path, capsys):
    out = tmp_path / "CODEGEN.md"
    assert codegen.main(["--out", str(out)]) == 0
    text = out.read_text()
    assert "python tools/codegen.py" in text and "nothing here was measured on a GPU" in text
    rows = [line.strip("| ") for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row.split(" | ")] for row in rows]
    assert ["decode.cu", "`tiles<3, 8>`", "sm_90a", "128", "0", "16", "HMMA 64", "ok"] in cells
    assert any(row[0] == "linear" and row[-1] == "ok" for row in cells)
    assert "a \\| b" in text, "a bar would end the cell"
    assert "1 rows of CUDA C++, 1 of Triton, 0 red" in capsys.readouterr().out


@pytest.mark.parametrize(
    "cuda, verdict",
    [
        (("decode.cu", "80", [], "first\nerror: expected a ;"), "RED: error: expected a ;"),
        (("decode.cu", "80", [kernel(spills=8)], ""), "RED: spills"),
        (("decode.cu", "80", [kernel(tensor=())], ""), "RED: no HMMA"),
        (("decode.cu", "80", [kernel(spills=8, tensor=())], ""), "RED: spills, no HMMA"),
    ],
)
def test_a_red_row_is_written_and_is_status_1(codegen, compilers, tmp_path, cuda, verdict):
    compilers["cuda"] = [cuda]
    assert codegen.main(["--out", str(tmp_path / "x.md")]) == 1
    assert verdict in (tmp_path / "x.md").read_text()


def test_without_compilers_the_file_is_left_alone(codegen, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(codegen.nvcc_gate, "find_nvcc", lambda: None)
    monkeypatch.setattr(kernels, "AVAILABLE", False)
    assert codegen.main(["--out", str(tmp_path / "x.md")]) == 2
    assert not (tmp_path / "x.md").exists() and "nvcc and Triton's compiler missing" in capsys.readouterr().err
