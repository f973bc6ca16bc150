"""The report: one file that needs nothing else, tables that agree with the result, and clear errors."""

import json
import re
import shlex

import pytest

from sparselottery import report


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
    assert not re.search(r'(src|href)="(?!data:)', page), "a self-contained page refers to nothing outside"
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
