"""Class damage: numbers by hand, tests against SciPy's, exemplars, and what has to be refused."""

import base64

import pytest
import torch
from scipy.stats import ttest_1samp

from sparselottery.analysis import class_damage as cd

ABOUT = {"density": 0.1, "level": 3, "seeds": [0, 1, 2]}


def probabilities(*labels, classes=3):
    """[networks, N, classes]: each network gives its labels 0.8."""
    chosen = torch.nn.functional.one_hot(torch.tensor(labels), classes).float()
    return chosen * 0.7 + 0.1


LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
DENSE = probabilities([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 0])
TICKET = probabilities([0, 0, 1, 1, 1, 2], [0, 0, 1, 1, 1, 2], [0, 0, 1, 1, 2, 2])


def test_numbers_by_hand():
    found = cd.class_damage(DENSE, TICKET, LABELS, 3)
    change = [entry["change"]["mean"] for entry in found["classes"]]
    assert change == pytest.approx([0, 0, (-0.5 - 0.5 + 0.5) / 3])
    assert found["overall"]["change"]["values"] == pytest.approx([-1 / 6, -1 / 6, 1 / 6])
    last = found["classes"][2]
    assert last["examples"] == 2 and last["dense"]["values"] == [1, 1, 0.5]
    assert last["excess"]["values"] == pytest.approx([-0.5 + 1 / 6, -0.5 + 1 / 6, 0.5 - 1 / 6])
    assert last["p"] == pytest.approx(ttest_1samp(last["excess"]["values"], 0).pvalue)
    assert last["p_holm"] >= last["p"]


def test_exemplars_by_hand():
    found = cd.class_damage(DENSE, TICKET, LABELS, 3)["exemplars"]
    assert (found["count"], found["indices"], found["label"]) == (1, [4], [2])
    assert (found["dense"], found["dense_votes"], found["ticket"], found["ticket_votes"]) == ([2], [3], [1], [2])
    assert found["exchanges"] == 4 and found["accuracy"]["exemplars"]["dense"]["mean"] == 1
    # example 4 differs only where the first two seeds stay together
    assert found["expected"] == pytest.approx(2 / 4) and found["p"] == 2 / 4


def test_holm():
    assert cd.holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06], abs=1e-12)
    assert cd.holm([0.9, 0.8]) == [1.0, 1.0] and cd.holm([]) == []


def test_t_test_of_equal_values():
    assert cd.t_test([0.0, 0.0]) == 1.0 and cd.t_test([0.1, 0.1, 0.1]) is None
    assert cd.t_test([0.1, 0.2, 0.4]) == pytest.approx(ttest_1samp([0.1, 0.2, 0.4], 0).pvalue)


def test_ties_go_to_the_larger_mean_probability():
    pair = torch.tensor([[[0.5, 0.3, 0.2]], [[0.1, 0.9, 0.0]]])
    label, votes = cd.modal_labels(pair)
    assert (label.item(), votes.item()) == (1, 1)
    assert cd.modal_labels(pair.flip(0))[0].item() == 1
    three = torch.tensor([[[0.4, 0.3, 0.3]], [[0.4, 0.3, 0.3]], [[0.0, 1.0, 0.0]]])
    assert cd.modal_labels(three)[0].item() == 0, "two votes win over one, whatever the probabilities"


def test_exchanges_are_all_or_a_fixed_number():
    assert len(set(cd._exchanges(5))) == 16
    many = cd._exchanges(30)
    assert len(many) == cd.EXCHANGES and not any(many[0]) and many == cd._exchanges(30)


def test_populations_that_agree_have_no_damage():
    found = cd.class_damage(DENSE, DENSE, LABELS, 3)
    assert found["exemplars"]["count"] == 0 and found["exemplars"]["p"] == 1.0
    assert all(entry["change"]["mean"] == 0 and entry["p_holm"] == 1.0 for entry in found["classes"])
    figures = cd.figures({**ABOUT, "examples": 6, **found, "pictures": None})
    assert figures[1].rows == [] and figures[1].caption.startswith("0 of 6 test examples")


def test_a_class_without_examples():
    wider = [torch.cat([p, torch.zeros(3, 6, 1)], -1) for p in (DENSE, TICKET)]
    found = cd.class_damage(*wider, LABELS, 4)
    assert found["classes"][3] == {"class": 3, "examples": 0, "p_holm": None} | dict.fromkeys(
        ("dense", "ticket", "change", "excess", "p")
    )
    assert [row[0] for row in cd.figures({**ABOUT, "examples": 6, **found})[0].rows] == ["all", "0", "1", "2"]


def test_figures_say_which_classes_are_hit():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    right = torch.nn.functional.one_hot(labels, 3).float().expand(5, -1, -1)
    wrong = right.clone()
    hit = (labels == 1) & (torch.rand(300, generator=generator) < 0.5)
    wrong[:, hit] = torch.tensor([1.0, 0.0, 0.0])
    wrong[0, 3] = torch.tensor([0.0, 1.0, 0.0])  # a little variance
    found = cd.class_damage(right, wrong, labels, 3)
    figure, sheet = cd.figures({**ABOUT, "seeds": [0] * 5, "examples": 300, **found, "pictures": None})
    assert "Classes 0, 1, 2 (squares)" in figure.caption and figure.rows[2][0] == "1"
    assert len(sheet.rows) == min(cd.MOST_ROWS, int(hit.sum())) and sheet.rows[0][2] == "1" and sheet.rows[0][4] == "0"


def test_pictures_are_the_images_and_drawn():
    x = torch.rand(6, 1, 4, 5)
    found = cd.pictures(x, [4])
    pixels = torch.frombuffer(bytearray(base64.b64decode(found["pixels"][0])), dtype=torch.uint8).view(4, 5)
    low, high = x.min(), x.max()
    assert found["shape"] == [4, 5, 1] and torch.equal(pixels, ((x[4, 0] - low) / (high - low) * 255).round().byte())
    damage = cd.class_damage(DENSE, TICKET, LABELS, 3)
    sheet = cd.figures({**ABOUT, "examples": 6, **damage, "pictures": found})[1]
    assert sheet.rows == [["4", "2", "2", "3", "1", "2"]] and "what dense networks say" in sheet.caption
    assert cd.pictures(torch.rand(40, 3, 4, 4), range(40))["shape"] == [4, 4, 3]
    assert len(cd.pictures(torch.rand(40, 3, 4, 4), range(40))["pixels"]) == cd.MOST_SHOWN
    assert cd.pictures(torch.rand(6, 7), [0]) is None, "vectors are no images"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dense": DENSE[:1], "ticket": TICKET[:1]}, "seeds: class damage .* at least 2 seeds, got 1"),
        ({"ticket": TICKET[:2]}, "dense, ticket: expected probabilities"),
        ({"labels": LABELS + 1}, "labels: expected classes 0 to 2, got 1 to 3"),
        ({"ticket": torch.full_like(TICKET, float("nan"))}, "ticket: the outputs of seed number 0 are not finite"),
        (
            {"dense": DENSE[:, :0], "ticket": TICKET[:, :0], "labels": LABELS[:0]},
            "labels: expected at least one example",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = {"dense": DENSE, "ticket": TICKET, "labels": LABELS, **change}
    with pytest.raises(ValueError, match=message):
        cd.class_damage(**arguments, classes=3)
