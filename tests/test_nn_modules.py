"""MaskedLinear, MaskedConv2d and the masked Conv1D of transformers: what they compute and how they behave as modules."""

import copy
import io
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune as torch_prune
from transformers.pytorch_utils import Conv1D

import sparselottery as sl


def keep_like(shape, density=0.3, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def linear(dtype=torch.float32):
    layer = sl.MaskedLinear(33, 7, dtype=dtype)
    layer.set_mask(keep_like(layer.weight.shape))
    return layer


def conv(dtype=torch.float32):
    layer = sl.MaskedConv2d(4, 6, 3, padding=1, dtype=dtype)
    layer.set_mask(keep_like(layer.weight.shape))
    return layer


def conv1d(dtype=torch.float32):
    layer = sl.sparsify(Conv1D(7, 33)).to(dtype)
    nn.init.normal_(layer.bias)
    layer.set_mask(keep_like(layer.weight.shape))
    return layer


def plain(layer, x):
    """What the layer must compute, in float64 from its weight and its mask."""
    weight = layer.weight.detach().double() * layer.mask.to_dense()
    bias = None if layer.bias is None else layer.bias.detach().double()
    if isinstance(layer, nn.Conv2d):
        reference = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            bias is not None,
            layer.padding_mode,
            dtype=torch.float64,
        )
        reference.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        return reference(x.double())
    return F.linear(x.double(), weight if isinstance(layer, nn.Linear) else weight.t(), bias)


LAYERS = {"linear": (linear, (5, 33)), "conv": (conv, (2, 4, 8, 8)), "conv1d": (conv1d, (2, 5, 33))}
every_layer = pytest.mark.parametrize("make, shape", LAYERS.values(), ids=LAYERS)


@every_layer
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 3e-2)])
def test_forward_matches_float64(make, shape, dtype, tolerance):
    layer, x = make(dtype), torch.randn(shape, dtype=dtype)
    got, want = layer(x), plain(layer, x)
    assert got.dtype == dtype
    assert (got.double() - want).norm() <= tolerance * want.norm()


@every_layer
def test_gradients_match_plain_layer_on_the_mask(make, shape):
    layer, x = make(torch.float64), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    twin = sl.densify(copy.deepcopy(layer))
    x2 = x.detach().clone().requires_grad_()
    layer(x).sin().sum().backward()
    twin(x2).sin().sum().backward()
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(layer.bias.grad, twin.bias.grad)
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad * layer.mask.to_dense())
    assert (layer.weight.grad[~layer.mask.to_dense()] == 0).all()


@every_layer
def test_gradcheck(make, shape):
    layer = make(torch.float64)
    x = torch.randn(1, *shape[1:], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x), (x,))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    "arguments",
    [
        dict(padding=1),
        dict(padding=(2, 1), stride=2),
        dict(padding="same", dilation=2),
        dict(padding="valid", groups=2, bias=False),
    ],
)
def test_conv_arguments_are_those_of_torch(mode, arguments):
    layer = sl.MaskedConv2d(4, 6, (3, 3), padding_mode=mode, **arguments)
    layer.set_mask(keep_like(layer.weight.shape))
    x = torch.randn(2, 4, 9, 10)
    want = plain(layer, x)
    assert layer(x).shape == want.shape
    torch.testing.assert_close(layer(x).double(), want, rtol=1e-4, atol=1e-5)


def test_full_mask_is_the_plain_layer():
    x = torch.randn(5, 33)
    layer = sl.MaskedLinear(33, 7)
    assert layer.density == 1 and torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@every_layer
def test_empty_batch(make, shape):
    layer = make()
    x = torch.randn(0, *shape[1:], requires_grad=True)
    layer(x).sum().backward()
    assert layer(x).shape[0] == 0 and (layer.weight.grad == 0).all()


def test_masks_at_construction_and_the_properties():
    keep = keep_like((7, 33))
    for mask in (keep, sl.Mask.from_dense(keep)):
        layer = sl.MaskedLinear(33, 7, mask=mask)
        assert torch.equal(layer.mask.to_dense(), keep) and layer.density == keep.sum().item() / keep.numel()
        assert (layer.weight[~keep] == 0).all() and (layer.weight[keep] != 0).all()
    assert layer.weight_mask.dtype == torch.int32 and layer.weight_mask.shape == (7, 2)
    assert f"density={layer.density:.4g}" in repr(layer)
    mask = layer.mask
    layer.set_mask(torch.zeros(7, 33, dtype=torch.bool))
    assert mask.count == keep.sum() and layer.density == 0, "the mask is a value, not a view"
    assert torch.equal(layer(torch.randn(2, 33)), layer.bias.expand(2, 7))


@pytest.mark.parametrize(
    "mask, error, says",
    [
        (torch.ones(7, 32, dtype=torch.bool), ValueError, "mask: expected shape [7, 33] like weight, got [7, 32]"),
        (sl.Mask.ones((33, 7)), ValueError, "mask: expected shape [7, 33] like weight, got [33, 7]"),
        (torch.ones(7, 33), TypeError, "mask: expected a Mask or a torch.bool tensor, got torch.float32"),
        ([1, 0], TypeError, "mask: expected a Mask or a torch.bool tensor, got list"),
    ],
)
def test_bad_masks(mask, error, says):
    layer = sl.MaskedLinear(33, 7)
    with pytest.raises(error, match=re.escape(says)):
        layer.set_mask(mask)
    assert layer.density == 1


@every_layer
@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_equal_independent_and_keep_their_zeros(make, shape, copier):
    layer, x = make(), torch.randn(shape)
    want = layer(x)
    if copier == "deepcopy":
        twin = copy.deepcopy(layer)
    elif copier == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert type(twin) is type(layer) and twin.mask == layer.mask and torch.equal(twin(x), want)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        with torch.no_grad():
            twin.weight.add_(1)
        twin(x).sum().backward()
        optimizer.step()
    assert (twin.weight[~twin.mask.to_dense()] == 0).all() and not torch.equal(twin.weight, layer.weight)
    assert torch.equal(layer(x), want)


@every_layer
def test_state_dict_round_trip_is_strict_and_plain_states_keep_everything(make, shape):
    layer, x = make(), torch.randn(shape)
    other = make()
    other.set_mask(keep_like(other.weight.shape, 0.5, seed=1))
    other.load_state_dict(layer.state_dict())
    assert other.mask == layer.mask and torch.equal(other(x), layer(x))
    dense = sl.densify(make())
    nn.init.normal_(dense.weight)
    assert set(dense.state_dict()) == {"weight", "bias"} == set(layer.state_dict()) - {"weight_mask"}
    other.load_state_dict(dense.state_dict())
    assert other.density == 1 and torch.equal(other.weight, dense.weight)
    torch.testing.assert_close(other(x), dense(x))
    other.load_state_dict(layer.state_dict(), assign=True)
    assert other.mask == layer.mask and torch.equal(other(x), layer(x))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({"bias": layer.bias})


def test_loading_clears_foreign_weights_and_padding_bits():
    layer = linear()
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    state["weight"].fill_(1)
    state["weight_mask"][:, -1] |= -2  # bits 33 and up lie past the last column
    layer.load_state_dict(state)
    assert layer.mask.count == layer.weight.count_nonzero() < layer.weight.numel()


@every_layer
@pytest.mark.parametrize("mode", ["train", "no_grad"])
def test_compiles_without_a_graph_break(make, shape, mode):
    layer, x = make(), torch.randn(shape)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(mode == "train"):
        torch.testing.assert_close(compiled(x), layer(x))
    if mode == "train":
        compiled(x).sum().backward()
        got, layer.weight.grad = layer.weight.grad, None
        layer(x).sum().backward()
        torch.testing.assert_close(got, layer.weight.grad)
    with torch.no_grad():
        layer.weight.data.fill_(1)  # nothing inside a compiled graph can see this; it must not count all the same
        torch.testing.assert_close(compiled(x).double(), plain(layer, x), rtol=1e-4, atol=1e-5)


def test_compile_follows_a_new_mask():
    layer, x = linear(), torch.randn(5, 33)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x)
    nn.init.normal_(layer.weight)
    layer.set_mask(keep_like(layer.weight.shape, 0.6, seed=5))
    torch.testing.assert_close(compiled(x).double(), plain(layer, x), rtol=1e-4, atol=1e-5)


@every_layer
def test_export(make, shape):
    layer, x = make(), torch.randn(shape)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))
    dense = sl.densify(copy.deepcopy(layer))
    torch.testing.assert_close(torch.export.export(dense, (x,)).module()(x), layer(x))


@every_layer
def test_autocast_follows_the_plain_layer(make, shape):
    layer, x = make(), torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
        want = sl.densify(copy.deepcopy(layer))(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@every_layer
def test_functional_call_and_vmap(make, shape):
    layer, x = make(), torch.randn(shape)
    weight = torch.randn(layer.weight.shape)
    got = torch.func.functional_call(layer, {"weight": weight}, (x,))
    layer2 = copy.deepcopy(layer)
    with torch.no_grad():
        layer2.weight.copy_(weight)
    torch.testing.assert_close(got, layer2(x))

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    gradient = torch.func.grad(loss)(dict(layer.named_parameters()))["weight"]
    layer(x).square().sum().backward()
    torch.testing.assert_close(gradient, layer.weight.grad)


@every_layer
@pytest.mark.parametrize("wrong", [None, [1, 2]], ids=str)
def test_input_that_is_no_tensor(make, shape, wrong):
    layer = make()
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(TypeError, match="x: expected a tensor, got"):
            layer(wrong)


def test_torch_prune_of_a_masked_layer_says_what_to_do():
    layer, x = linear(), torch.randn(2, 33)
    mask, want = layer.mask, layer(x)
    for call in (torch_prune.l1_unstructured, torch_prune.random_unstructured):
        with pytest.raises(
            ValueError, match=r"weight_mask: expected int32 words, got torch.float32; .*sl\.prune.*sl\.from_torch_prune"
        ) as caught:
            call(layer, "weight", 0.5)
        assert "\n" not in str(caught.value)
    assert layer.mask == mask and torch.equal(layer(x), want), "as before"
    torch_prune.l1_unstructured(layer, "bias", 0.5)
    assert (layer.bias == 0).any()


def test_inference_mode_and_meta():
    with torch.inference_mode():
        layer = sl.MaskedLinear(33, 7, mask=keep_like((7, 33)))
        layer.weight.fill_(1)
        x = torch.randn(2, 33)
        want = F.linear(x, torch.ones(7, 33) * layer.mask.to_dense(), layer.bias)
        torch.testing.assert_close(layer(x), want)  # no versions to look at
    meta = sl.MaskedLinear(33, 7, device="meta")
    assert meta.weight_mask.is_meta and "33" in repr(meta)
    source = linear()
    meta.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = torch.randn(2, 33)
    assert meta.mask == source.mask and torch.equal(meta(x), source(x))


def test_hooks_and_module_moves():
    layer, x, seen = linear(), torch.randn(5, 33), []
    layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    layer.double()
    assert layer.weight_mask.dtype == torch.int32 and layer(x.double()).dtype == torch.float64 and seen == [(5, 7)]
    layer.weight.data.fill_(1)
    layer.half().float()
    assert torch.allclose(layer(x).double(), plain(layer, x), atol=1e-5)
    layer.reset_parameters()
    assert (layer.weight[~layer.mask.to_dense()] == 0).all()
