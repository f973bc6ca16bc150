"""derived: what is computed from a mask lives as long as the mask and no longer than its present bits."""

import copy
import gc

import torch

from sparselottery.ops import derived


def test_kept_with_the_tensor_and_gone_with_it():
    words = torch.zeros(2, 1, dtype=torch.int32)
    derived.of(words)["answer"] = 42
    assert derived.of(words) == {"answer": 42}
    assert derived.of(words.clone()) == {} and derived.of(copy.deepcopy(words)) == {}
    before = len(derived._KEPT)
    del words
    gc.collect()
    assert len(derived._KEPT) < before


def test_empty_again_after_a_change_in_place():
    words = torch.zeros(2, 1, dtype=torch.int32)
    derived.of(words)["answer"] = 42
    with torch.no_grad():
        words.copy_(torch.ones_like(words))
    assert derived.of(words) == {}


def test_nothing_is_kept_for_inference_tensors():
    with torch.inference_mode():
        words = torch.zeros(2, 1, dtype=torch.int32)
        derived.of(words)["answer"] = 42
        assert derived.of(words) == {}
