"""Weight motion: numbers by hand, the KS distance against SciPy's, and figures of what has holes."""

import pytest
import torch
from scipy.stats import ks_2samp

from sparselottery.analysis import weight_motion as wm
from sparselottery.masks import Mask

INITIAL = {"a.weight": torch.tensor([[0.5, -0.5], [0.1, -0.1]]), "a.bias": torch.zeros(2)}
TRAINED = {"a.weight": torch.tensor([[0.75, -0.75], [-0.1, -0.05]]), "a.bias": torch.ones(2)}
MASKS = {"a": Mask.from_dense(torch.tensor([[True, True], [False, False]]))}
ABOUT = {"density": 0.5, "level": 1, "seeds": [0]}


def test_numbers_by_hand():
    found = wm.weight_motion(INITIAL, TRAINED, MASKS)
    assert list(found) == ["a", wm.ALL] and found["a"] == found[wm.ALL], "one layer is all of them; biases have no mask"
    winning, other = found["a"]["winning"], found["a"]["other"]
    assert winning["count"] == other["count"] == 2
    assert winning["moved"]["mean"] == pytest.approx(0.25) and winning["outward"]["mean"] == pytest.approx(0.25)
    assert other["moved"]["mean"] == pytest.approx((0.2 + 0.05) / 2)
    assert other["outward"]["mean"] == pytest.approx((0 - 0.05) / 2)
    assert (winning["away"], winning["flipped"], other["away"], other["flipped"]) == (1, 0, 0, 0.5)
    assert found["a"]["ks"] == 1.0, "every winning weight moved further than every other"
    for group in (winning, other):
        for measure in wm.MEASURES:
            assert sum(group[measure]["histogram"]) == pytest.approx(1)
            assert group[measure]["quantiles"] == sorted(group[measure]["quantiles"])


def test_the_histogram_counts_where_the_values_are():
    edges = {
        "moved": torch.linspace(0, 0.42, wm.BINS + 1).tolist(),
        "outward": torch.linspace(-0.9, 0.9, wm.BINS + 1).tolist(),
    }
    found = wm.weight_motion(INITIAL, TRAINED, MASKS, {"a": edges, wm.ALL: edges})["a"]
    assert found["winning"]["moved"]["histogram"][23] == 1.0  # 0.25 of 0.42 in 40 bins
    assert found["winning"]["outward"]["histogram"][25] == 1.0  # 0.25 on -0.9..0.9
    wide = wm.weight_motion(
        INITIAL, {**TRAINED, "a.weight": TRAINED["a.weight"] * 100}, MASKS, {"a": edges, wm.ALL: edges}
    )
    assert wide["a"]["winning"]["moved"]["histogram"][-1] == 1.0, "what lies outside is counted in the last bin"


def test_kolmogorov_smirnov_is_scipys():
    generator = torch.Generator().manual_seed(0)
    for n, m in ((50, 70), (3, 400)):
        a = torch.randn(n, generator=generator).mul(4).round().double()  # ties
        b = torch.randn(m, generator=generator).add(0.3).mul(4).round().double()
        assert wm.kolmogorov_smirnov(a, b) == pytest.approx(ks_2samp(a.numpy(), b.numpy()).statistic)
    assert wm.kolmogorov_smirnov(a, b[:0]) is None


def test_quantiles_are_values_that_so_many_do_not_exceed():
    values = torch.arange(1, 101).double()
    assert [wm._quantile(values, q) for q in (0.05, 0.5, 0.95, 1.0)] == [5, 50, 95, 100]


def test_a_group_without_weights_has_no_values():
    full = {"a": Mask.ones((2, 2))}
    found = wm.weight_motion(INITIAL, TRAINED, full)["a"]
    assert found["ks"] is None and found["other"]["count"] == 0 and found["other"]["moved"]["mean"] is None
    assert found["winning"]["count"] == 4
    figures = wm.figures(wm.numbers([(INITIAL, TRAINED, full)], ABOUT))
    assert figures[0].rows[1][:4] == ["a", "other", "0", "–"]


def test_weights_that_stood_still():
    found = wm.weight_motion(INITIAL, INITIAL, MASKS)["a"]
    assert found["winning"]["moved"]["mean"] == 0 and found["winning"]["away"] == 0 and found["ks"] == 0


def test_intervals_over_seeds_and_figures():
    other = {**TRAINED, "a.weight": TRAINED["a.weight"] * 1.1}
    numbers = wm.numbers([(INITIAL, TRAINED, MASKS), (INITIAL, other, MASKS)], {**ABOUT, "seeds": [0, 1]})
    moved = numbers["layers"]["a"]["winning"]["moved"]["mean"]
    assert moved["mean"] == pytest.approx((0.25 + 0.325) / 2) and moved["ci95"] > 0
    figures = wm.figures(numbers)
    assert [f.name for f in figures] == ["weight_moved", "weight_outward"]
    assert figures[0].rows[0][:3] == ["a", "winning", "2"] and "±" in figures[0].rows[0][3]
    assert figures[1].rows[0][-2:] == ["100.0 ± 0.0", "0.0 ± 0.0"]


def test_many_layers_are_all_in_the_table_and_some_in_the_picture():
    names = [f"l{i}" for i in range(20)]
    states = [{f"{n}.weight": state["a.weight"] for n in names} for state in (INITIAL, TRAINED)]
    figure = wm.figures(wm.numbers([(*states, dict.fromkeys(names, MASKS["a"]))], ABOUT))[0]
    assert len(figure.rows) == 2 * 21 and f"{wm.MOST_PANELS} of 20 layers are drawn" in figure.caption


@pytest.mark.parametrize(
    ("initial", "trained", "message"),
    [
        ({}, TRAINED, r"initial: no a\.weight"),
        (INITIAL, {"a.weight": torch.zeros(3, 2)}, r"trained: a\.weight: expected \[2, 2\] like its mask"),
        (INITIAL, {"a.weight": torch.full((2, 2), float("nan"))}, r"trained: a\.weight: expected finite values"),
    ],
)
def test_what_does_not_fit_is_named(initial, trained, message):
    with pytest.raises(ValueError, match=message):
        wm.weight_motion(initial, trained, MASKS)


def test_no_masks():
    with pytest.raises(ValueError, match="masks: expected at least one"):
        wm.weight_motion(INITIAL, TRAINED, {})
