"""The state_dict entries of one layer, from masked to packed and back: checkpoints of either load into the other."""

from ..ops import bitmask, packed


def to_packed_state(state: dict, prefix: str, shape) -> None:
    """Turn the entries of a layer of this shape, masked or packed, into those of a packed layer, in place.

    Raises:
        TypeError, ValueError: they do not fit the shape or each other.
    """
    values_key, weight_key, mask_key = prefix + "values", prefix + "weight", prefix + "weight_mask"
    if weight_key in state and values_key not in state:
        weight = state[weight_key]
        if tuple(weight.shape) != tuple(shape):
            raise ValueError(f"weight: expected {list(shape)}, got {list(weight.shape)}")
        words = state.get(mask_key)
        # The state of a layer without a mask: everything is kept.
        words = bitmask.full_words(shape, True, weight.device) if words is None else words.to(weight.device)
        state[values_key] = packed.gather(weight.detach(), words)
        state[mask_key] = words
        del state[weight_key]
    elif values_key in state and mask_key in state:
        words = state[mask_key]
        bitmask.check_words(words, shape, "weight_mask")
        state[mask_key] = words = words & bitmask.full_words(shape, True, words.device)  # padding is 0
        count = bitmask.count(words)
        if state[values_key].shape != (count,):
            raise ValueError(
                f"values: expected [{count}] for a weight_mask that keeps {count}, got {list(state[values_key].shape)}"
            )


def to_masked_state(state: dict, prefix: str, shape) -> None:
    """Turn the entries of a packed layer of this shape into those of a masked layer, in place; others stay as they are.

    Raises:
        TypeError, ValueError: they do not fit the shape or each other.
    """
    values_key, weight_key, mask_key = prefix + "values", prefix + "weight", prefix + "weight_mask"
    if values_key in state and mask_key in state and weight_key not in state:
        to_packed_state(state, prefix, shape)
        values = state.pop(values_key)
        state[weight_key] = packed.expand(values.detach(), state[mask_key].to(values.device), shape)
