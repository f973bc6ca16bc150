"""Augmentation: what it may do to an image, and that it follows seed and iteration."""

import pytest
import torch
from torch import nn

import sparselottery as sl
from sparselottery.training.augment import flip_crop, generator_of


def shifted(image, top, left, flip, padding):
    """The same by the book: pad, cut, mirror."""
    padded = torch.nn.functional.pad(image, (padding,) * 4)
    cut = padded[:, top : top + image.shape[1], left : left + image.shape[2]]
    return cut.flip(2) if flip else cut


def test_every_image_is_a_mirrored_cut_of_itself():
    x = torch.rand(64, 3, 6, 5, generator=torch.Generator().manual_seed(0)) + 1
    before = x.clone()
    found = flip_crop(x, generator_of(0, 0), padding=2)
    assert found.shape == x.shape and torch.equal(x, before)
    seen = set()
    for image, result in zip(x, found, strict=True):
        matches = [
            (top, left, flip)
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            if torch.equal(shifted(image, top, left, flip, 2), result)
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 25 and {flip for *_, flip in seen} == {False, True}


def test_it_follows_seed_and_iteration_alone():
    x = torch.rand(8, 1, 8, 8)
    state = torch.get_rng_state()
    first = flip_crop(x, generator_of(3, 7))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, flip_crop(x, generator_of(3, 7)))
    assert not torch.equal(first, flip_crop(x, generator_of(3, 8)))
    assert not torch.equal(first, flip_crop(x, generator_of(4, 7)))


def test_bad_input():
    with pytest.raises(ValueError, match=r"x: expected images \[N, channels, height, width\], got \[4, 9\]"):
        flip_crop(torch.zeros(4, 9), generator_of(0, 0))
    with pytest.raises(TypeError, match="augment: expected a callable"):
        sl.Trainer((torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)), augment="flip")


def trainer(augment):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 1, 4, 4, generator=generator), torch.randint(0, 3, (40,), generator=generator)
    return sl.Trainer((x, y), test=(x, y), batch_size=8, budget=12, evaluate_every=6, augment=augment)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def test_training_with_it_resumes_bit_equal_and_says_why_not_in_cpp():
    train = trainer(flip_crop)
    assert train.why_not_whole_step(model()) == "minibatches are augmented"
    whole, plain = model(), model()
    history = train.fit(whole, seed=1)
    trainer(None).fit(plain, seed=1)
    assert not torch.equal(whole[1].weight, plain[1].weight)
    again = model()
    assert train.fit(again, seed=1).records == history.records
    seen = []
    noting = trainer(lambda x, generator: seen.append(torch.rand(1, generator=generator).item()) or x)
    noting.fit(model(), seed=1)
    late = model()
    first, seen[:] = list(seen), []
    noting.fit(late, seed=1, start_at=5)
    assert len(first) == 12 and seen == first[5:]
    assert train.config() != trainer(None).config()


def test_replicas_refuse_it():
    assert "augmented" in trainer(flip_crop).why_not_many(model())
    with pytest.raises(ValueError, match="models: minibatches are augmented"):
        trainer(flip_crop).fit_many([model(), model()], seeds=[0, 1])
