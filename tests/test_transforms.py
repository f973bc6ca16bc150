"""Forward mode and torch.func through the masked ops and layers: equal to the dense formula, whatever the backend."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import sparselottery as sl
from sparselottery.ops import reference
from sparselottery.ops.block_linear import block_linear
from sparselottery.ops.masked_conv2d import masked_conv2d
from sparselottery.ops.masked_linear import masked_linear
from sparselottery.ops.packed_layers import packed_conv2d, packed_linear


def cases(dtype):
    """name -> (our function of x, weight, bias, theirs, the three, the mask)."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    keep, kernel_keep = torch.rand(40, 70, generator=g) < 0.1, torch.rand(6, 4, 3, 3, generator=g) < 0.1
    words, kernel_words = reference.bitmask_pack(keep), reference.bitmask_pack(kernel_keep)
    return {
        "linear": (
            lambda x, w, b: masked_linear(x, w, words, b),
            lambda x, w, b: F.linear(x, w * keep, b),
            (randn(5, 70), randn(40, 70), randn(40)),
        ),
        "conv2d": (
            lambda x, w, b: masked_conv2d(x, w, kernel_words, b, 2, 1),
            lambda x, w, b: F.conv2d(x, w * kernel_keep, b, 2, 1),
            (randn(2, 4, 7, 7), randn(6, 4, 3, 3), randn(6)),
        ),
        "block_linear": (
            lambda x, w, b: block_linear(x, w, words, b, block=(16, 16)),
            lambda x, w, b: F.linear(x, w * keep, b),
            (randn(5, 70), randn(40, 70), randn(40)),
        ),
        "packed_linear": (
            lambda x, values, b: packed_linear(x, values, words, b, keep.shape),
            lambda x, values, b: F.linear(x, reference.packed_expand(values, words, keep.shape), b),
            (randn(5, 70), randn(int(keep.sum())), randn(40)),
        ),
        "packed_linear transposed": (
            lambda x, values, b: packed_linear(x, values, words, b, keep.shape, transposed=True),
            lambda x, values, b: x @ reference.packed_expand(values, words, keep.shape) + b,
            (randn(5, 40), randn(int(keep.sum())), randn(70)),
        ),
        "packed_conv2d": (
            lambda x, values, b: packed_conv2d(x, values, kernel_words, b, kernel_keep.shape, (2, 2), (1, 1)),
            lambda x, values, b: F.conv2d(x, reference.packed_expand(values, kernel_words, kernel_keep.shape), b, 2, 1),
            (randn(2, 4, 7, 7), randn(int(kernel_keep.sum())), randn(6)),
        ),
    }


KINDS = tuple(cases(torch.float32))


@pytest.fixture(params=KINDS)
def case(request):
    return cases(torch.float64)[request.param]


@pytest.mark.parametrize("backend", [None, "cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_jvp(kind, backend, monkeypatch):
    if backend:
        monkeypatch.setenv("SPARSELOTTERY_BACKEND", backend)
    ours, theirs, inputs = cases(torch.float32)[kind]
    tangents = tuple(torch.ones_like(t) for t in inputs)
    for got, want in zip(torch.func.jvp(ours, inputs, tangents), torch.func.jvp(theirs, inputs, tangents), strict=True):
        torch.testing.assert_close(got, want)
        assert want.abs().max() > 1


@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_numbers(case, requires_grad):
    ours, theirs, (x, w, b) = case
    w.requires_grad_(requires_grad)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        got, want = (forward_ad.unpack_dual(f(dual, w, b)) for f in (ours, theirs))
        torch.testing.assert_close(got.tangent, want.tangent)
        torch.testing.assert_close(got.primal, want.primal)
        if requires_grad:
            torch.testing.assert_close(*(torch.autograd.grad(r.tangent.square().sum(), w)[0] for r in (got, want)))


def test_gradcheck_in_forward_mode(case):
    ours, _, inputs = case
    inputs = tuple(t.requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(ours, inputs, check_forward_ad=True, check_backward_ad=False)


def test_jacobians_and_hessians(case):
    ours, theirs, (x, w, b) = case
    torch.testing.assert_close(*(torch.func.jacfwd(f, argnums=0)(x[:1], w, b) for f in (ours, theirs)))
    torch.testing.assert_close(*(torch.func.hessian(lambda b, f=f: f(x, w, b).pow(3).sum())(b) for f in (ours, theirs)))


def test_a_batch_of_weights(case):
    ours, _, (x, w, b) = case
    weights = torch.stack([w, 2 * w])
    torch.testing.assert_close(
        torch.func.vmap(ours, (None, 0, None))(x, weights, b), torch.stack([ours(x, w, b), ours(x, 2 * w, b)])
    )


@pytest.mark.parametrize(
    "transform", [torch.func.jvp, torch.func.grad, torch.func.vmap, torch.func.jacrev, torch.func.jacfwd]
)
def test_a_layer_whose_weight_is_closed_over(transform):
    g = torch.Generator().manual_seed(0)
    layer, plain = nn.Linear(70, 40), nn.Linear(70, 40)
    sl.prune(layer, density=0.1)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    x = torch.randn(5, 70, generator=g)
    keep = layer.mask.to_dense()

    def run(model):
        def f(x):
            y = model(x).square()
            return y.sum() if transform is torch.func.grad else y

        return transform(f, (x,), (x,))[1] if transform is torch.func.jvp else transform(f)(x)

    got, want = run(layer), run(plain)
    torch.testing.assert_close(got, want)
    got.sum().backward()  # and the gradients of what the transform did not see are masked as ever
    want.sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad * keep)
    assert layer.weight.grad.abs().max() > 0
