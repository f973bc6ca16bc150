"""Mask as a value, and the registry of who masks a parameter."""

import copy
import gc
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparselottery as sl
from sparselottery import Mask, masks

SHAPES = [(), (0,), (7,), (3, 0), (5, 27), (4, 3, 3, 3), (2, 64)]


def sample(shape, seed, density=0.5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 99), st.sampled_from([0.0, 0.4, 1.0]))
def test_is_the_value_of_its_bools(shape, seed, density):
    a, b = sample(shape, seed, density), sample(shape, seed + 1)
    mask, other = Mask.from_dense(a), sl.Mask.from_dense(b)
    assert mask.shape == a.shape and mask.numel == a.numel() and torch.equal(mask.to_dense(), a)
    assert mask.count == int(a.sum())
    assert torch.equal((mask & other).to_dense(), a & b)
    assert torch.equal((mask | other).to_dense(), a | b)
    assert torch.equal((~mask).to_dense(), ~a)
    assert ~~mask == mask and (mask == other) == torch.equal(a, b) and (mask != other) != torch.equal(a, b)
    if a.numel():
        assert mask.density == a.double().mean().item() and mask.sparsity == pytest.approx(1 - mask.density)
        assert mask.distance(other) == (a ^ b).double().mean().item() == other.distance(mask)
        assert mask.distance(~mask) == 1.0 and mask.distance(mask) == 0.0
    else:
        assert mask.density == 1.0 and mask.sparsity == 0.0 and mask.distance(other) == 0.0
    assert Mask.ones(shape) == Mask.from_dense(torch.ones(shape, dtype=torch.bool)) == ~Mask.zeros(shape)
    for twin in (copy.deepcopy(mask), copy.copy(mask), pickle.loads(pickle.dumps(mask)), Mask(mask.words, mask.shape)):
        assert twin == mask and twin.shape == mask.shape


def test_deepcopy_shares_nothing_and_to_shares_what_it_can():
    mask = Mask.from_dense(sample((5, 40), 0))
    assert copy.deepcopy(mask).words.data_ptr() != mask.words.data_ptr()
    assert mask.to("cpu") is mask and mask.device == torch.device("cpu")
    assert mask.to("meta").words.shape == mask.words.shape


def test_repr_and_other_types():
    mask = Mask.from_dense(torch.eye(3, 4).bool())
    assert repr(mask) == "Mask(shape=[3, 4], kept=3 of 12)"
    assert (mask == 3) is False and mask != "mask"
    with pytest.raises(TypeError):
        hash(mask)
    with pytest.raises(TypeError):
        mask & torch.eye(3, 4).bool()


@pytest.mark.parametrize(
    "call, error, says",
    [
        (
            lambda m: m.distance(Mask.ones((4, 5))),
            ValueError,
            r"other: expected a mask of shape \[3, 40\], got \[4, 5\]",
        ),
        (lambda m: m & Mask.ones((3, 41)), ValueError, "other: expected a mask of shape"),
        (lambda m: m.distance(m.to_dense()), TypeError, "other: expected a Mask, got Tensor"),
        (lambda m: m | m.to("meta"), ValueError, "other: expected a mask on cpu, got meta"),
        (lambda m: Mask(m.words, (3, 65)), ValueError, r"words: expected int32 \[3, 3\]"),
        (lambda m: Mask(m.words.long(), (3, 40)), TypeError, "words: expected int32 words"),
        (lambda m: Mask(m.words | 256, (3, 40)), ValueError, "words: expected zero padding bits"),
        (lambda m: Mask(m.words | -(2**31), (3, 63)), ValueError, "words: expected zero padding bits"),
        (lambda m: Mask.from_dense(torch.ones(3)), TypeError, "dense: expected torch.bool"),
        (lambda m: Mask.ones((2, -1)), ValueError, r"shape: expected sizes of at least 0, got \[2, -1\]"),
        (lambda m: Mask.zeros((-2, 3)), ValueError, r"shape: expected sizes of at least 0, got \[-2, 3\]"),
        (lambda m: Mask(m.words[:, :0], (3, -1)), ValueError, "shape: expected sizes of at least 0"),
        (lambda m: Mask.ones(5), TypeError, "shape: expected a sequence of ints, got 5"),
        (lambda m: Mask.zeros((2, 1.5)), TypeError, r"shape: expected a sequence of ints, got \(2, 1.5\)"),
    ],
)
def test_bad_input_names_the_argument(call, error, says):
    with pytest.raises(error, match=says):
        call(Mask.zeros((3, 40)))


class Owner:
    def __init__(self, words):
        self.weight_mask = words


def test_registry_is_weak_on_both_sides():
    param = torch.nn.Parameter(torch.randn(3, 40))
    assert masks.words_of(param) is None
    first, second = Owner(Mask.ones((3, 40)).words), Owner(Mask.zeros((3, 40)).words)
    masks.attach(param, first)
    masks.attach(param, first)
    assert masks.words_of(param) is first.weight_mask
    first.weight_mask = Mask.zeros((3, 40)).words  # the owner's present words, not those of the day it was attached
    assert masks.words_of(param) is first.weight_mask
    masks.attach(param, second)
    assert masks.words_of(param) is second.weight_mask
    del second
    gc.collect()
    assert masks.words_of(param) is first.weight_mask  # a weight shared by two layers: the other one still masks it
    del first
    gc.collect()
    assert masks.words_of(param) is None
    owner, before = Owner(None), len(masks._owners)
    masks.attach(param, owner)
    del param
    gc.collect()
    assert len(masks._owners) < before + 1
