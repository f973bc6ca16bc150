"""The report: one file that needs nothing else, tables that agree with the result, and clear errors."""

import json
import re
import shlex

import pytest

from sparselottery import analysis, report
from sparselottery.analysis import stability


def statistic(mean, ci95=0.01):
    return {"mean": mean, "ci95": ci95, "values": [mean, mean]}


@pytest.fixture
def folder(tmp_path):
    levels = []
    for i, density in enumerate((1.0, 0.5, 0.25, 0.04)):
        level = {"level": i, "density": density}
        for kind in ("ticket", "reinit") if i else ("ticket",):
            accuracy = 0.97 - 0.01 * i * (kind == "reinit")
            level[kind] = {
                "test_accuracy": statistic(accuracy),
                "early_stop_iteration": statistic(100.0 * (i + 1), 5.0),
            }
        levels.append(level)
    result = {"found": {"level": 2, "seed": 0, "density": 0.25}, "levels": levels}
    result["speed"] = {"train_step": 1.5, "inference": 2.25}
    (tmp_path / "result.json").write_text(json.dumps(result))
    records = [
        {"seed": 0, "level": v["level"], "kind": k, "density": v["density"], "iteration": i}
        | {"validation_accuracy": 0.9, "test_accuracy": 0.9}
        for v in levels
        for k in ("ticket", "reinit")
        for i in (20, 40)
        if k in v
    ]  # fmt: skip
    lines = "".join(json.dumps(r) + "\n" for r in records)
    (tmp_path / "metrics.jsonl").write_text(lines + '{"seed": 0, "lev')  # torn by a kill
    hparams = {"data": "digits", "rounds": 3, "controls": ["reinit"], "control_levels": None}
    (tmp_path / "config.json").write_text(json.dumps({"driver": "imp", "hparams": hparams}))
    return tmp_path


def test_the_page_stands_alone(folder):
    path = report.write_report(folder)
    page = path.read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page), "a self-contained page refers to nothing outside"
    assert page.count("data:image/png;base64,") == 3
    assert 'name="viewport"' in page, "readable on a phone"
    for words in (
        "25.0",
        "96.00 ± 1.00",
        "inference 2.25x",
        "sparselottery imp --data digits --rounds 3 --controls reinit",
    ):
        assert words in page, words
    for name in ("accuracy.png", "early_stop.png", "learning_curves.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_the_verdict_names_the_ticket_found(folder):
    result = json.loads((folder / "result.json").read_text())
    assert "25.0 % of the weights" in report.verdict(result) and "95.00" in report.verdict(result)
    result["found"]["level"] = 0
    assert report.verdict(result).startswith("No ticket matched")


def test_the_table_has_one_row_per_level(folder):
    levels = json.loads((folder / "result.json").read_text())["levels"]
    header, rows = report.summary_rows(levels)
    assert [row[0] for row in rows] == ["100.0", "50.0", "25.0", "4.0"]
    assert rows[0][header.index("random reinit: test acc. %")] == "–"
    assert rows[3][header.index("winning ticket: early stop")] == "400 ± 5"
    text = report.text_table(header, rows).splitlines()
    assert len(text) == 6 and len({len(line) for line in text}) == 1


def test_a_single_seed_has_no_interval(folder):
    result = json.loads((folder / "result.json").read_text())
    for level in result["levels"]:
        level["ticket"]["test_accuracy"]["ci95"] = None
    (folder / "result.json").write_text(json.dumps(result))
    assert "97.00 %" in report.write_report(folder).read_text()


def test_what_is_missing_or_damaged_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        report.write_report(tmp_path / "nowhere")
    (folder / "result.json").write_text('{"levels": []}')
    with pytest.raises(ValueError, match=r"result\.json: expected the result of a finished run"):
        report.write_report(folder)
    (folder / "result.json").unlink()
    with pytest.raises(FileNotFoundError, match="has not finished"):
        report.write_report(folder)


@pytest.mark.parametrize(
    "levels", [[{"density": 1}], [3], [{"density": "x", "ticket": {}}], [{"density": 1, "ticket": 2}]]
)
def test_a_result_of_another_shape_is_named(folder, levels):
    (folder / "result.json").write_text(json.dumps({"levels": levels}))
    with pytest.raises(ValueError, match=r"result\.json: expected the result of a finished run"):
        report.write_report(folder)


def test_lines_that_are_no_records_are_left_out(folder):
    page = report.write_report(folder).read_text()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n3\n{}\nnull\n")
    assert report.write_report(folder).read_text() == page


def test_a_run_that_measured_no_test_accuracy(folder):
    result = json.loads((folder / "result.json").read_text())
    for level in result["levels"]:
        for kind in ("ticket", "reinit"):
            level.get(kind, {}).pop("test_accuracy", None)
    (folder / "result.json").write_text(json.dumps(result))
    assert "no test accuracy was measured" in report.write_report(folder).read_text()


def test_the_command_spells_out_what_is_empty_and_breaks_no_word():
    levels = list(range(1, 60))
    hparams = {"controls": [], "rate": 0.2, "control_levels": levels, "seeds": 5}
    words = shlex.split(report.command_of({"driver": "imp", "hparams": hparams}).replace("\\\n", ""))
    assert words[2:4] == ["--controls", ""]
    assert words[words.index("--control-levels") + 1] == ",".join(map(str, levels))


# ---- analyses, and runs of other commands ----


def barrier_numbers():
    line = {
        "at": [0, 0.5, 1],
        "loss": [0.1, 0.2, 0.1],
        "error": [0.1, 0.3, 0.1],
        "barrier_error": 0.2,
        "barrier_loss": 0.1,
    }
    about = {"density": 0.25, "level": 2, "seeds": [0], "rewind": "init"}
    return stability.numbers({"dense": [line], "ticket": [line]}, [], about)


def test_analyses_are_shown_with_their_command_and_table(folder):
    command = "sparselottery analyze runs/x stability --level 2"
    analysis.save(folder, "stability", barrier_numbers(), command)
    page = report.write_report(folder).read_text()
    assert page.count("data:image/png;base64,") == 4 and command in page
    assert "Error barrier between two children" in page and "barrier in loss" in page
    assert (folder / "analysis" / "barrier.png").read_bytes().startswith(b"\x89PNG")
    assert report.write_report(folder).read_text() == page, "the same run gives the same page"


def test_an_analysis_of_a_later_version_is_named(folder):
    analysis.save(folder, "stability", barrier_numbers(), "x")
    text = (folder / "analysis" / "stability.json").read_text().replace('"stability"', '"telepathy"')
    (folder / "analysis" / "telepathy.json").write_text(text)
    page = report.write_report(folder).read_text()
    assert "analysis/telepathy.json is not known to this version" in page and "Error barrier" in page


@pytest.mark.parametrize(
    "text", ["{", '{"analysis": "stability", "command": "x", "numbers": {}}', '{"analysis": "landscape"}']
)
def test_a_damaged_analysis_is_named(folder, text):
    (folder / "analysis").mkdir()
    (folder / "analysis" / "stability.json").write_text(text)
    with pytest.raises(ValueError, match=r"analysis/stability\.json: expected the numbers"):
        report.write_report(folder)


def test_analyses_alone_make_a_report(folder):
    analysis.save(folder, "stability", barrier_numbers(), "x")
    (folder / "result.json").unlink()
    assert report.write_report(folder).read_text().count("data:image/png;base64,") == 1


def test_a_result_of_another_command_is_a_table(folder):
    result = {
        "run": "x",
        "drawn_epoch": {"mean": 4.0, "ci95": None, "values": [4]},
        "epochs": 20,
        "distances": [[0.0, 0.5], [0.5, 0.0]],
        "test_accuracy": statistic(0.95),
        "cost": {"search": {"seconds": 1.5}, "dense": None, "metered": False},
        "methods": {"random": {"test_accuracy": statistic(0.9), "density": 0.25}},
        "not_measured": {"mean": None, "ci95": None, "values": []},
    }
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "config.json").write_text(
        json.dumps({"driver": "early-bird", "hparams": {"data": "digits", "model": "m"}})
    )
    page = report.write_report(folder).read_text()
    assert "<h1>early-bird: m on digits</h1>" in page and "drawn after epoch 4 of 20" in page
    assert "<h2>Results</h2>" in page
    cells = dict(re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", page))
    assert cells == {
        "drawn epoch": "4.00",
        "epochs": "20",
        "test accuracy, %": "95.00 ± 1.00",
        "cost / search / seconds": "1.5",
        "cost / metered": "no",
        "methods / random / test accuracy, %": "90.00 ± 1.00",
        "methods / random / density, %": "25.00",
    }
    analysis.save(folder, "stability", barrier_numbers(), "x")
    assert "<summary>all results as numbers</summary>" in report.write_report(folder).read_text()
    (folder / "result.json").write_text(json.dumps({**result, "drawn_epoch": None}))
    assert "No ticket was drawn." in report.write_report(folder).read_text()
    (folder / "result.json").write_text(json.dumps({**result, "verdict": "It is <b>fine</b>."}))
    assert "It is &lt;b&gt;fine&lt;/b&gt;." in report.write_report(folder).read_text()


def test_a_result_that_is_no_object_is_named(folder):
    (folder / "result.json").write_text("[]")
    with pytest.raises(ValueError, match=r"result\.json: .*an object was expected"):
        report.write_report(folder)


def test_what_users_typed_is_escaped(folder):
    config = {"driver": "imp", "hparams": {"data": "<script>alert(1)</script>", "quick": True, "slow": False}}
    (folder / "config.json").write_text(json.dumps(config))
    page = report.write_report(folder).read_text()
    assert "<script" not in page and "--quick --no-slow" in page
