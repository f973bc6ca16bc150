"""The heatmap of mask distances: yellow where masks agree, dark where they are far; its table, its CSV and its sentence."""

import copy
import io

import matplotlib.image
import numpy as np
import pytest

from sparselottery import analysis
from sparselottery.analysis import early_bird

VIRIDIS_LOW, VIRIDIS_HIGH = (0x44, 0x01, 0x54), (0xFD, 0xE7, 0x25)


def statistic(mean, half=1.0):
    return {"mean": mean, "ci95": half, "values": [mean - half, mean + half]}


def both(seconds, joules=None):
    return {"seconds": statistic(seconds), "joules": joules and statistic(joules)}


def numbers(distances, drawn=None, window=2, joules=None):
    j = joules or (None,) * 5
    return {
        "distances": distances, "drawn_epoch": drawn, "epochs": 10, "density": 0.5, "structure": "channel", "window": window,
        "threshold": 0.1, "drawn_epochs": {"mean": drawn, "ci95": 0.5, "values": [drawn, drawn]},
        "macs": {"dense": 300, "ticket": 100},
        "cost": {
            "dense": both(10, j[0]), "search": both(2, j[1]), "retrain": both(4, j[2]), "early-bird": both(6, j[3]),
            "imp": both(60, j[4]), "making": {"seconds": statistic(0.1), "joules": None}, "rounds": 5,
            "ratio": {"early-bird / dense": {"seconds": 0.6, "joules": 0.5 if joules else None},
                      "imp / early-bird": {"seconds": 10.0, "joules": 9.0 if joules else None}},
            "energy": {"source": "RAPL" if joules else None, "why_not": None if joules else "no meter"},
            "how": "dense measured; imp computed as 6 dense trainings",
        },
    }  # fmt: skip


def area(png, colour):
    pixels = (matplotlib.image.imread(io.BytesIO(png))[..., :3] * 255).round()
    return int((np.abs(pixels - np.array(colour)).max(-1) <= 2).sum())


def test_masks_that_agree_are_yellow_and_far_ones_dark():
    far = [[float(i != j) for j in range(4)] for i in range(4)]  # the diagonal alone agrees: a quarter
    near = [[float(i != j and 0 in (i, j)) for j in range(4)] for i in range(4)]  # 10 of 16 agree
    for distances, ratio in ((far, 3.0), (near, 6 / 10)):
        png = early_bird.figures(numbers(distances))[0].png
        assert area(png, VIRIDIS_LOW) / area(png, VIRIDIS_HIGH) == pytest.approx(ratio, rel=0.15)


def test_the_table_tells_when_the_ticket_was_drawn():
    distances = [[0, 0.3, 0.35, 0.36], [0.3, 0, 0.05, 0.06], [0.35, 0.05, 0, 0.02], [0.36, 0.06, 0.02, 0]]
    figure = early_bird.figures(numbers(distances, drawn=3))[0]
    assert figure.name == "early-bird-distances" and "the square: epoch 3" in figure.caption
    assert figure.rows == [
        ["1", "–", "–", "queue not full"],
        ["2", "0.3000", "0.3000", "above"],
        ["3", "0.0500", "0.0500", "drawn"],
        ["4", "0.0200", "0.0200", "below"],
    ]
    wider = early_bird.figures(numbers(distances, drawn=4, window=3))[0]
    assert [row[2:] for row in wider.rows] == [["–", "queue not full"], ["0.3000", "queue not full"], ["0.3500", "above"],
                                               ["0.0600", "drawn"]]  # fmt: skip
    assert "never was" in early_bird.figures(numbers(distances))[0].caption


def test_one_epoch_and_equal_masks_can_be_drawn_too():
    for distances in ([[0.0]], [[0.0] * 3] * 3):
        assert early_bird.figures(numbers(distances))[0].png.startswith(b"\x89PNG")


def test_csv_is_the_whole_matrix():
    assert early_bird.csv([[0, 0.25], [0.25, 0]]) == "epoch,1,2\n1,0,0.25\n2,0.25,0\n"


def test_costs_are_shown_in_energy_where_it_was_measured():
    time = early_bird.figures(numbers([[0.0]]))[1]
    assert "No energy was measured: no meter." in time.caption and "computed as 6 dense trainings" in time.caption
    assert [row[1:] for row in time.rows[:2]] == [["10.00 ± 1.00", "–"], ["6.00 ± 1.00", "–"]]
    energy = early_bird.figures(numbers([[0.0]], joules=(100, 10, 40, 50, 600)))[1]
    assert "Energy: RAPL." in energy.caption and energy.rows[2][2] == "600.00 ± 1.00" and energy.png != time.png


def test_the_sentence_says_when_and_at_what_cost():
    text = early_bird.sentence(numbers([[0.0]], drawn=2))
    assert text.startswith(
        "Drawn after 2.0 ± 0.5 of 10 epochs (20 %). The ticket's network takes 3.0 times fewer multiply-adds."
    )
    assert (
        "0.60 times the time of dense training; iterative pruning would take 10.0 times" in text
        and "energy" not in text
    )
    assert "0.50 times the energy" in early_bird.sentence(numbers([[0.0]], 2, joules=(1, 1, 1, 1, 1)))
    half = numbers([[0.0]], drawn=2)
    half["drawn_epochs"]["values"][1] = None
    assert "1 of 2 seeds never drew." in early_bird.sentence(half)
    assert early_bird.sentence(numbers([[0.0]])).startswith("No ticket was drawn within 10 epochs")


def test_it_is_an_analysis_that_reports_find(tmp_path):
    own = numbers([[0.0, 0.5], [0.5, 0.0]], drawn=2)
    analysis.save(tmp_path, "early-bird", own, "sparselottery early-bird")
    found = analysis.load(tmp_path)["early-bird"]["numbers"]
    assert [f.name for f in analysis.figures("early-bird", found)] == ["early-bird-distances", "early-bird-cost"]
    damaged = copy.deepcopy(found)
    del damaged["cost"]
    with pytest.raises(ValueError, match=r"analysis/early-bird\.json: expected the numbers of this analysis"):
        analysis.figures("early-bird", damaged)
