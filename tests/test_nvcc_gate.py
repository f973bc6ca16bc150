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
    assert first == {"symbol": "first", "name": "first", "registers": 32, "spills": 0, "shared": 64}
    assert second == {"symbol": "second", "name": "second", "registers": 64, "spills": 40, "shared": 0}
    with pytest.raises(ValueError, match="unknown form"):
        gate.parse("ptxas info    : Compiling entry function 'k' for 'sm_90'\n")


LISTING = """	.section	.text.first,"ax",@progbits
.text.first:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/              @!P0 HMMA.16816.F32.BF16 R4, R8, R14, R4 ;
.text.second:
        /*0000*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4], R24 ;
        /*0010*/                   IMAD.MOV R2, RZ, RZ, R3 ;
"""


def test_tensor_instructions():
    assert gate.tensor_instructions(LISTING) == {"first": {"HMMA": 2}, "second": {"HGMMA": 1}}


def test_names_keep_their_template_arguments():
    name = "_ZN2sl4cuda12_GLOBAL__N_15tilesILNS_5DTypeE3ELi8EEEvNS1_13TileArgumentsE"
    assert gate.demangle([name]) in (["tiles<3, 8>"], [name])  # as it is, where c++filt is missing


def kernels(count=2, tensor=None):
    return [kernel | {"tensor": tensor} for kernel in gate.parse(REPORT)[:count]]


def tiles(tensor):
    return [kernels(1)[0] | {"name": "tiles<3, 8>", "tensor": tensor}]


@pytest.mark.parametrize(
    "compiled, status, says",
    [
        (([], "error: expected a ;"), 1, "does not compile"),
        ((kernels(), ""), 1, "RED: spills"),
        ((kernels(1), ""), 0, "all green"),
        ((tiles({}), ""), 1, "RED: no HMMA"),
        ((tiles({"HMMA": 64}), ""), 0, "HMMA 64"),
        ((tiles(None), ""), 0, "unknown"),
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
