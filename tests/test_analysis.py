"""The numbers of an analysis in its run folder, and figures as values."""

import json
import types

import numpy as np
import pytest
import torch

from sparselottery import analysis
from sparselottery.analysis import figure

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def known(monkeypatch):
    """An analysis `known`, whose figure shows one number."""

    def figures(numbers):
        return [figure.Figure("known", "Known", "A caption.", PNG, ["value"], [[f"{numbers['value']:.1f}"]])]

    module = types.ModuleType("sparselottery.analysis.known")
    module.figures = figures
    monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
    monkeypatch.setitem(analysis.ANALYSES, "known", "known")
    return "known"


def test_numbers_come_back_as_they_were_saved(tmp_path, known):
    numbers = {"value": np.float32(0.5), "list": torch.tensor([1, 2]), "pair": (1, None), "flag": np.bool_(True)}
    path = analysis.save(tmp_path, known, numbers, "sparselottery analyze run known")
    assert path == tmp_path / "analysis" / "known.json"
    expected = {
        "analysis": known,
        "command": "sparselottery analyze run known",
        "numbers": {"value": 0.5, "list": [1, 2], "pair": [1, None], "flag": True},
    }
    assert json.loads(path.read_text()) == expected
    assert analysis.load(tmp_path) == {known: expected} and analysis.read(tmp_path, known) == expected
    assert analysis.figures(known, expected["numbers"])[0].rows == [["0.5"]]


def test_what_json_cannot_say_is_null(tmp_path, known):
    analysis.save(tmp_path, known, {"a": float("nan"), "b": [np.inf, 1.0], "c": torch.tensor(float("nan"))}, "x")
    assert analysis.read(tmp_path, known)["numbers"] == {"a": None, "b": [None, 1.0], "c": None}


def test_a_run_without_analyses_has_none(tmp_path, known):
    assert analysis.load(tmp_path) == {} and analysis.read(tmp_path, known) is None


def test_unknown_names_and_other_mistakes_are_named(tmp_path, known):
    with pytest.raises(ValueError, match=r"analysis: expected one of .*known, got 'other'"):
        analysis.save(tmp_path, "other", {}, "x")
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        analysis.save(tmp_path / "nowhere", known, {}, "x")
    with pytest.raises(TypeError, match="numbers: expected a mapping, got list"):
        analysis.save(tmp_path, known, [], "x")
    with pytest.raises(TypeError, match=r"numbers\['a'\]\[1\]: expected what JSON can hold, got object"):
        analysis.save(tmp_path, known, {"a": [1, object()]}, "x")
    with pytest.raises(TypeError, match="keys that are strings, got 1"):
        analysis.save(tmp_path, known, {"a": {1: 2}}, "x")
    with pytest.raises(ValueError, match=r"analysis/known\.json: expected the numbers of this analysis"):
        analysis.figures(known, {"values": 1})


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"analysis": "other", "command": "", "numbers": {}}', '{"a": 1}'])
def test_a_damaged_file_is_named(tmp_path, known, text):
    analysis.save(tmp_path, known, {"value": 1}, "x")
    (tmp_path / "analysis" / "known.json").write_text(text)
    for read in (lambda: analysis.load(tmp_path), lambda: analysis.read(tmp_path, known)):
        with pytest.raises(ValueError, match=r"known\.json: expected the numbers of an analysis, got a damaged file"):
            read()


def draw(canvas):
    (axes,) = figure.panels(canvas)
    axes.plot([1, 2], [3, 4], color=figure.BLUE, marker=figure.MARKERS[0])


@pytest.mark.filterwarnings("error")
def test_a_picture_has_the_size_asked_and_leaves_no_traces():
    import matplotlib

    before = dict(matplotlib.rcParams)
    png = figure.render(draw, (2.0, 1.5))
    assert dict(matplotlib.rcParams) == before
    assert (int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")) == (2 * figure.DPI, 1.5 * figure.DPI)
    assert figure.render(draw, (2.0, 1.5)) == png
    assert figure.Figure("a_b-1.c", "t", "c", png, [], []).png == png


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../x"}, "name: expected"),
        ({"name": "Upper"}, "name: expected"),
        ({"png": b"GIF89a"}, "png: expected"),
        ({"rows": [["1"], ["1", "2"]]}, r"rows\[1\]: expected 1 cells"),
    ],
)
def test_a_figure_that_is_none_is_refused(change, message):
    fields = {"name": "n", "title": "t", "caption": "c", "png": PNG, "header": ["h"], "rows": []}
    with pytest.raises(ValueError, match=message):
        figure.Figure(**{**fields, **change})


def test_cells():
    assert figure.number(None) == "–" and figure.number(0.12345) == "0.123" and figure.number(0.5, 1, 100) == "50.0"
    assert figure.interval(0.5, None) == "0.50" and figure.interval(0.5, 0.01, 1, 100) == "50.0 ± 1.0"
    assert figure.interval(None, None) == "–"
