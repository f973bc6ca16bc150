"""Histories: early stop, JSON, what a user's fit may return, step strings."""

import json

import pytest
import torch

from sparselottery.training.history import History, Record, parse_step

RECORDS = [
    Record(100, 2.0, 0.50, 0.80, 0.81),
    Record(200, 1.0, 0.20, 0.90, 0.91),
    Record(300, 0.5, float("nan"), 0.90, 0.95),
    Record(400, 0.2, 0.20, 0.95, 0.93),
]


def test_early_stop_is_the_first_minimum_of_validation_loss():
    history = History(RECORDS)
    assert history.early_stop_iteration == 200
    assert history.validation_loss == 0.20 and history.validation_accuracy == 0.90
    assert history.test_accuracy_at_early_stop == history.test_accuracy == 0.91
    assert history.final_test_accuracy == 0.93


def test_without_validation_there_is_no_early_stop():
    history = History([Record(10, test_accuracy=0.5), Record(20, test_accuracy=0.6)])
    assert history.early_stop_iteration is None and history.test_accuracy_at_early_stop is None
    assert history.test_accuracy == history.final_test_accuracy == 0.6
    assert History().test_accuracy is None


def test_at():
    history = History(RECORDS)
    assert history.at(250).iteration == 200 and history.at(9999).iteration == 400
    with pytest.raises(ValueError, match="iteration: expected one at or after the first evaluation, got 99"):
        history.at(99)


def test_json_round_trip():
    history = History([r for r in RECORDS if r.iteration != 300])
    assert History.from_json(json.loads(json.dumps(history.to_json(), allow_nan=False))) == history
    diverged = json.loads(json.dumps(History(RECORDS).to_json(), allow_nan=False))
    assert History.from_json(diverged).records[2] == Record(300, 0.5, None, 0.90, 0.95)
    with pytest.raises(ValueError, match="value: expected"):
        History.from_json({"metrics": []})


def test_what_a_fit_may_return():
    history = History(RECORDS)
    assert History.of(history) is history
    assert History.of(history.to_json()).records[0] == RECORDS[0]
    single = History.of({"test_accuracy": torch.tensor(0.5), "early_stop_iteration": 7, "extra": "ignored"})
    assert single.records == [Record(7, test_accuracy=0.5)]
    unsaid = History.of({"test_accuracy": 0.5, "validation_loss": 1.0})
    assert unsaid.validation_loss == 1.0 and unsaid.test_accuracy == 0.5 and unsaid.early_stop_iteration is None
    assert History.from_json(json.loads(json.dumps(unsaid.to_json()))) == unsaid
    with pytest.raises(ValueError, match="iteration: expected one at or after the first evaluation"):
        unsaid.at(10)
    weights = {"w": torch.ones(1)}
    assert History.of({"test_accuracy": 1, "snapshot": weights}).snapshot is weights


@pytest.mark.parametrize(
    "value", [None, 0.97, [0.97], {"accuracy": 0.97}, {"test_accuracy": "good"}, {"records": [{"loss": 1}]}]
)
def test_anything_else_is_refused_by_the_name_of_the_fit(value):
    with pytest.raises(TypeError, match="my_fit: "):
        History.of(value, "my_fit")


@pytest.mark.parametrize("step, expected", [(0, 0), (500, 500), ("500it", 500), ("2ep", 40), ("2ep5it", 45)])
def test_steps(step, expected):
    assert parse_step(step, 20) == expected


@pytest.mark.parametrize("step", ["", "5 00", "it", "5it2ep", "-3it", "2 ep", -1])
def test_steps_that_are_none(step):
    with pytest.raises(ValueError, match="rewind: expected"):
        parse_step(step, 20, "rewind")


def test_a_number_typed_without_a_unit_counts_iterations():
    assert parse_step("4") == 4 and parse_step("0") == 0
    for step in ("4 it", "-4", "4.0", "2ep4", ""):
        with pytest.raises(ValueError, match="step: expected iterations or a string"):
            parse_step(step, 20)


def test_steps_of_other_types_and_unknown_epochs():
    for step in (1.5, None, True):
        with pytest.raises(TypeError, match="step: expected"):
            parse_step(step, 20)
    with pytest.raises(ValueError, match="'2ep' counts epochs"):
        parse_step("2ep")
