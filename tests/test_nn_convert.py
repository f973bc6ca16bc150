"""sparsify, densify, from_torch_prune: what changes, what stays, what is left alone."""

import copy
import pickle
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune
from transformers.pytorch_utils import Conv1D

import sparselottery as sl
from sparselottery.nn import left_dense, masked_modules


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 36, 10),
        nn.Sequential(nn.Linear(10, 3)),
    )


def test_round_trip_changes_nothing_but_the_classes():
    model, x = network().eval(), torch.randn(2, 1, 8, 8)
    model[0].weight.requires_grad_(False)
    calls = []
    model[4].register_forward_hook(lambda *args: calls.append(1))
    modules, parameters, keys = list(model.modules()), list(model.parameters()), list(model.state_dict())
    classes, want = [type(m) for m in modules], model(x)
    assert sl.sparsify(model) is model
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    masked = ["0", "4", "5.0"]
    assert [name for name, _ in masked_modules(model)] == masked
    assert sorted(model.state_dict()) == sorted(keys + [f"{name}.weight_mask" for name in masked])
    assert isinstance(model[0], sl.MaskedConv2d) and isinstance(model[4], sl.MaskedLinear)
    assert isinstance(model[0], nn.Conv2d) and isinstance(model[4], nn.Linear)
    assert not model.training and not model[4].training and not model[0].weight.requires_grad
    assert torch.equal(model(x), want) and len(calls) == 2
    mask = torch.rand(10, 144) < 0.5
    model[4].set_mask(mask)
    assert sl.sparsify(model)[4].mask == sl.Mask.from_dense(mask), "a second time changes nothing"
    want = model(x)
    assert sl.densify(model) is model
    assert [type(m) for m in model.modules()] == classes and list(model.state_dict()) == keys
    assert torch.equal(model(x), want) and (model[4].weight[~mask] == 0).all() and len(calls) == 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[4].weight.grad = torch.ones_like(model[4].weight)
    optimizer.step()
    assert (model[4].weight[~mask] != 0).all(), "nothing keeps the zeros of a plain layer"
    assert sl.sparsify(model)[4].density == 1


def test_masked_states_load_into_plain_layers_after_densify():
    model = network()
    sl.prune(model, density=0.3)
    plain = network()
    with pytest.raises(RuntimeError, match="weight_mask"):
        plain.load_state_dict(model.state_dict())
    plain.load_state_dict(sl.densify(copy.deepcopy(model)).state_dict())
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(plain(x), model(x))


@pytest.mark.parametrize(
    "exclude, left",
    [
        ("4", ["4"]),
        (("0", "5.0"), ["0", "5.0"]),
        ("5", ["5.0"]),
        ("5*", ["5.0"]),
        (nn.Linear, ["4", "5.0"]),
        ((nn.Conv2d, "4"), ["0", "4"]),
        ("", ["0", "4", "5.0"]),
    ],
)
def test_exclude(exclude, left):
    model = network()
    assert sorted(left_dense(model, exclude=exclude)) == left
    sl.sparsify(model, exclude=exclude)
    assert [name for name, _ in masked_modules(model)] == [n for n in ("0", "4", "5.0") if n not in left]


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: sl.sparsify(network(), exclude="fc"), ValueError, "exclude: no module is called 'fc'"),
        (lambda: sl.sparsify(network(), exclude=[3]), TypeError, "exclude: expected names or classes, got int"),
        (lambda: sl.sparsify(network(), exclude=5), TypeError, "exclude: expected names or classes, got int"),
        (lambda: sl.sparsify([nn.Linear(2, 2)]), TypeError, "model: expected an nn.Module, got list"),
        (lambda: sl.densify({}), TypeError, "model: expected an nn.Module, got dict"),
        (lambda: sl.from_torch_prune(network()), ValueError, "model: expected layers pruned by torch.nn.utils.prune"),
    ],
)
def test_bad_arguments(call, error, says):
    with pytest.raises(error, match=re.escape(says)):
        call()


def test_a_single_layer_is_converted_in_place():
    layer = nn.Linear(4, 3)
    assert (
        sl.sparsify(layer) is layer and type(layer) is sl.MaskedLinear and list(layer.state_dict())[-1] == "weight_mask"
    )
    assert sl.densify(layer) is layer and type(layer) is nn.Linear


class Scaled(nn.Linear):
    """A forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


class Named(nn.Linear):
    """No forward of its own, but a method and an attribute."""

    tag = "named"

    def half_weight(self):
        return self.weight / 2


class Same(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, bias) + 1


def test_subclasses():
    model = nn.Sequential(Named(4, 4), Scaled(4, 4))
    with pytest.warns(UserWarning, match="1: Scaled has a forward of its own"):
        sl.sparsify(model)
    assert type(model[1]) is Scaled
    named = model[0]
    assert isinstance(named, Named) and isinstance(named, sl.MaskedLinear) and named.half_weight().shape == (4, 4)
    named.set_mask(torch.eye(4, dtype=torch.bool))
    for twin in (copy.deepcopy(named), pickle.loads(pickle.dumps(named))):
        assert type(twin) is type(named) and twin.mask == named.mask and twin.weight_mask is not named.weight_mask
        assert twin.tag == "named" and torch.equal(twin.weight, named.weight)
    assert type(sl.densify(model)[0]) is Named
    with pytest.warns(UserWarning, match="Same has a forward"):
        assert type(sl.sparsify(Same(1, 1, 1))) is Same

    class Mine(sl.MaskedLinear):
        pass

    assert type(sl.densify(Mine(2, 2))) is nn.Linear


def test_computed_weights_are_left_alone_with_a_warning():
    model = nn.ModuleDict(
        {
            "weight_norm": parametrizations.weight_norm(nn.Linear(4, 4)),
            "orthogonal": parametrizations.orthogonal(nn.Linear(4, 4)),
            "pruned": torch_prune.l1_unstructured(nn.Linear(4, 4), "weight", 3),
            "lazy": nn.LazyLinear(4),
            "complex": nn.Linear(4, 4, dtype=torch.complex64),
            "fine": nn.Linear(4, 4),
        }
    )
    before = {name: type(module) for name, module in model.items()}
    with pytest.warns(UserWarning) as caught:
        sl.sparsify(model)
    assert len(caught) == 1
    says = str(caught[0].message)
    for part in (
        "weight_norm: its weight is computed by a parametrization",
        "orthogonal: its weight is computed",
        "pruned: pruned by torch.nn.utils.prune (from_torch_prune converts it)",
        "lazy: its shape is not known yet",
        "complex: its weight is torch.complex64",
    ):
        assert part in says
    assert "fine" not in says
    assert {n: type(m) for n, m in model.items() if n != "fine"} == {n: c for n, c in before.items() if n != "fine"}
    assert type(model["fine"]) is sl.MaskedLinear
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # asked for, so no surprise
        sl.sparsify(model, exclude=("weight_norm", "orthogonal", "pruned", "lazy", "complex"))


def test_weights_shared_with_something_else_stay_dense():
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(9, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 9, bias=False)}
    )
    model["head"].weight = model["embedding"].weight
    assert left_dense(model) == {"head": "shares its weight with embedding (Embedding)"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sl.sparsify(model)
    assert type(model["head"]) is nn.Linear and type(model["body"]) is sl.MaskedLinear


def test_conv1d_of_transformers():
    model, x = nn.Sequential(Conv1D(6, 4), nn.Linear(6, 2)), torch.randn(3, 5, 4)
    want = model(x)
    sl.sparsify(model)
    assert isinstance(model[0], Conv1D) and model[0].weight_mask.shape == (4, 1)
    torch.testing.assert_close(model(x), want)
    assert type(sl.densify(model)[0]) is Conv1D


def pruned_by_torch():
    model = network()
    torch_prune.global_unstructured(
        [(model[0], "weight"), (model[4], "weight")], pruning_method=torch_prune.L1Unstructured, amount=0.7
    )
    torch_prune.random_unstructured(model[4], "weight", amount=0.1)  # a second method on top
    return model


@pytest.mark.parametrize("through", ["as it is", "deepcopy of the state"])
def test_from_torch_prune(through):
    model, x = pruned_by_torch(), torch.randn(2, 1, 8, 8)
    if through != "as it is":
        state = copy.deepcopy(model.state_dict())
        model = pruned_by_torch()
        model.load_state_dict(state)
    model.eval()
    want, keep = model(x).detach(), [model[i].weight_mask.bool().clone() for i in (0, 4)]
    parameters = [model[0].weight_orig, model[4].weight_orig]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    keys = list(network().state_dict())
    assert sl.from_torch_prune(model) is model
    torch.testing.assert_close(model(x), want)
    assert model[0].weight is parameters[0] and model[4].weight is parameters[1]
    assert [torch.equal(model[i].mask.to_dense(), k) for i, k in zip((0, 4), keep, strict=True)] == [True, True]
    assert sorted(model.state_dict()) == sorted([*keys, "0.weight_mask", "4.weight_mask"])
    assert not model[0]._forward_pre_hooks and not model[4]._forward_pre_hooks
    assert type(model[5][0]) is nn.Linear, "never pruned, left as it is"
    model(x).sum().backward()
    optimizer.step()
    assert (model[4].weight[~keep[1]] == 0).all() and (model[4].weight[keep[1]] != 0).any()
    copy.deepcopy(model), pickle.dumps(model)


def test_from_torch_prune_bias_and_layers_that_cannot_be_masked():
    layer = nn.Linear(4, 4)
    torch_prune.l1_unstructured(layer, "weight", 8)
    torch_prune.l1_unstructured(layer, "bias", 2)
    bias = layer.bias.clone()
    with pytest.warns(UserWarning, match="bias was pruned too"):
        sl.from_torch_prune(layer)
    assert torch.equal(layer.bias, bias) and (bias == 0).sum() == 2 and next(iter(layer.state_dict())) == "weight"
    model = nn.Sequential(torch_prune.l1_unstructured(nn.Conv1d(2, 2, 3), "weight", 2))
    with pytest.raises(ValueError, match="0: Conv1d cannot be a masked layer"):
        sl.from_torch_prune(model)
    assert hasattr(model[0], "weight_orig")
