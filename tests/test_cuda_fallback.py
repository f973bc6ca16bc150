"""What happens on a GPU that this build has no CUDA kernels for; no GPU is needed to show it."""

import warnings

import pytest
import torch

from sparselottery import _ext
from sparselottery.ops import bitmask, decode_linear, global_topk, packed, reference, sparse_linear

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Pretends: gpu(archs of the build or None, capability of the GPU)."""

    class Build:
        def __init__(self, archs):
            self.cuda_archs = archs

        def __getattr__(self, name):
            raise AssertionError(f"{name} was called although it cannot run")

    def pretend(archs, capability):
        monkeypatch.setattr(_ext, "_C", Build(archs))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        _ext.why_no_cuda.cache_clear()
        decode_linear._why_not.cache_clear()

    yield pretend
    monkeypatch.undo()
    _ext.why_no_cuda.cache_clear()
    decode_linear._why_not.cache_clear()


@pytest.mark.parametrize(
    "archs, capability, reason",
    [
        ("80;86;89;90", (8, 0), None),
        ("80;90a", (8, 9), None),
        ("80", (12, 0), None),  # by its PTX
        ("80;90", (7, 5), "built for compute capability 8.0 on, this GPU has 7.5"),
        ("90a", (8, 0), "built for compute capability 9.0 on, this GPU has 8.0"),
        (None, (9, 0), "has no CUDA kernels"),
    ],
)
def test_the_reason_is_said_once(gpu, archs, capability, reason):
    gpu(archs, capability)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answers = [_ext.why_no_cuda(DEVICE) for _ in range(3)]
    if reason is None:
        assert answers == [None] * 3 and not caught
    else:
        assert all(reason in answer for answer in answers)
        (warning,) = caught
        assert reason in str(warning.message) and "\n" not in str(warning.message)


def test_ops_fall_back_to_torch(monkeypatch):
    dense = torch.rand(5, 70) < 0.3
    words = reference.bitmask_pack(dense)
    values = torch.randn(5, 70)
    monkeypatch.setattr(_ext, "why_no_cuda", lambda device: "no kernels for it")
    assert torch.equal(bitmask._pack_cuda(dense), words)
    assert torch.equal(bitmask._unpack_cuda(words, dense.shape), dense)
    assert int(bitmask._count_cuda(words)) == int(dense.sum())
    assert int(bitmask._hamming_cuda(words, reference.bitmask_pack(~dense))) == dense.numel()
    zeroed = values.clone()
    bitmask._apply_cuda(zeroed, words)
    assert torch.equal(zeroed, values * dense)
    gathered = packed._gather_cuda(zeroed, words, int(dense.sum()))
    assert torch.equal(gathered, values[dense])
    assert torch.equal(packed._expand_cuda(gathered, words, list(dense.shape)), zeroed)


@pytest.mark.filterwarnings("ignore:the CUDA kernels were built")
def test_choices_go_to_triton_and_then_to_torch(gpu, monkeypatch):
    gpu("80;90", (7, 0))
    monkeypatch.setattr(global_topk.kernels, "AVAILABLE", True)
    assert global_topk.backend_of(DEVICE) == "triton"
    monkeypatch.setattr(global_topk.kernels, "AVAILABLE", False)
    assert global_topk.backend_of(DEVICE) == "reference"
    assert "this GPU has 7.0" in decode_linear.why_dense(DEVICE, "gap8", 64)
    gpu("80;90", (9, 0))
    assert global_topk.backend_of(DEVICE) == "cuda"
    gpu("80;90", (7, 0))
    assert not sparse_linear.takes(Pretended(), 0.01)
    gpu("80;90", (8, 0))
    assert sparse_linear.takes(Pretended(), 0.01)


class Pretended:
    """What `takes` reads of a float32 tensor on a GPU."""

    is_cuda, dtype, device = True, torch.float32, DEVICE
