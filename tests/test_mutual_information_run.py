"""The comparison of ways to choose neurons: its run folder, its numbers, its sentence, its figures, its command."""

import copy
import html
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from sparselottery import analysis
from sparselottery.analysis import mutual_information as drawn
from sparselottery.cli import main
from sparselottery.experiments import runs
from sparselottery.experiments.hparams import METHODS, MutualInformation
from sparselottery.experiments.mutual_information import Comparison, NeuronWatch, run_mutual_information
from sparselottery.tickets.store import Job, Store
from sparselottery.tickets.ticket import Ticket

SMALL = MutualInformation(seeds=2, budget="40it", evaluate_every=20, density=0.2, rate=0.5, window=2, fraction=0.5)
OPTIONS = [
    f"--{name}={getattr(SMALL, name.replace('-', '_'))}"
    for name in ("seeds", "budget", "evaluate-every", "density", "rate", "window", "fraction")
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    return run_mutual_information(SMALL, out, workers=1), out


def contents(folder):
    parts = [*sorted(folder.glob("tickets/*.safetensors")), folder / "metrics.jsonl"]
    return {path.name: path.read_bytes() for path in parts}


def folder_of(finished):
    return finished[1] / runs.name("mutual-information", SMALL)


def test_what_it_returns(finished):
    result, _ = finished
    assert {"run", "density", "dense", "methods", "overlap", "chance_overlap", "information", "verdict"} <= set(result)
    assert result["run"] == str(folder_of(finished)) and tuple(result["methods"]) == METHODS
    assert result["neurons"] == {"fc1": 300, "fc2": 100}
    for found in result["methods"].values():
        assert found["density"]["values"] == [0.2, 0.2]
        assert found["weight_density"]["values"] == [pytest.approx((64 * 60 + 60 * 20 + 20 * 10) / 50200)] * 2
        assert {"test_accuracy", "final_test_accuracy", "validation_loss"} <= set(found)
        assert len(found["test_accuracy"]["values"]) == 2 and found["test_accuracy"]["ci95"] >= 0
    cost = {method: found["cost"]["relative"]["mean"] for method, found in result["methods"].items()}
    assert cost == {
        "mutual-information": 1.5,
        "early-bird": pytest.approx(cost["early-bird"]),
        "imp": 4,
        "magnitude": 2,
        "random": 1,
    }
    assert result["methods"]["imp"]["rounds"] == 3 and 1 < cost["early-bird"] <= 2
    compute = {method: found["cost"]["compute"]["mean"] for method, found in result["methods"].items()}
    assert compute["random"] == pytest.approx(result["methods"]["random"]["weight_density"]["mean"])
    assert compute["random"] < compute["mutual-information"] < compute["magnitude"] < compute["imp"] < cost["imp"]
    for a in METHODS:
        for b in METHODS:
            assert result["overlap"][a][b] == result["overlap"][b][a]
            assert result["chance_overlap"][a][b]["mean"] == pytest.approx(0.2)
        assert result["overlap"][a][a]["values"] == [1, 1]
    for layer, curves in result["information"].items():
        assert len(curves["mean"]) == result["neurons"][layer] and curves["mean"] == sorted(
            curves["mean"], reverse=True
        )
        assert all(low <= high for low, high in zip(curves["least"], curves["most"], strict=True))


def test_tickets_are_rewound_and_keep_whole_neurons(finished):
    result, _ = finished
    plan = Comparison(SMALL, runs.Fit(SMALL), folder_of(finished))
    initial = plan.build(1).state_dict()
    kept = {}
    for method in METHODS:
        ticket = Ticket.load(plan.ticket(Job(1, 1, method)))
        assert all(torch.equal(value, initial[key]) for key, value in ticket.initial.items())  # the biases of θ0 are 0
        rows = {name: mask.to_dense().any(1) for name, mask in ticket.masks.items()}
        assert rows["output"].all() and rows["fc1"].sum() == 60 and rows["fc2"].sum() == 20
        assert torch.equal(ticket.masks["fc2"].to_dense(), rows["fc2"][:, None] & rows["fc1"])
        assert torch.equal(ticket.masks["output"].to_dense(), rows["fc2"].expand(10, -1))
        kept[method] = rows
    shared = sum(int((kept["imp"][n] & kept["magnitude"][n]).sum()) for n in ("fc1", "fc2")) / 80
    assert result["overlap"]["imp"]["magnitude"]["values"][1] == shared
    bits = Store(plan.folder).job(Job(1, 1, "mutual-information"))["about"]["bits"]["fc1"]
    best = torch.tensor(bits).sort(descending=True, stable=True).indices[:60]
    assert kept["mutual-information"]["fc1"][best].all()


def test_run_again_and_other_workers(finished, tmp_path):
    result, out = finished
    folder, before = folder_of(finished), contents(folder_of(finished))
    times = {path: path.stat().st_mtime_ns for path in (folder / "jobs").iterdir()}
    events = []
    again = run_mutual_information(SMALL, out, workers=2, progress=events.append)
    assert [e["event"] for e in events] == ["start"] and events[0]["done"] == 12 == len(times)
    assert again == result and {path: path.stat().st_mtime_ns for path in times} == times
    Store(folder).verify()
    (folder / "tickets" / "seed1-imp.safetensors").unlink()
    (folder / "jobs" / "seed0-level01-mutual-information.json").unlink()
    (folder / "tickets" / "seed0-dense.safetensors").write_bytes(b"cut")
    events.clear()
    run_mutual_information(SMALL, out, workers=2, progress=events.append)
    assert len(events) == 1 + 3 and contents(folder) == before


def test_two_seeds_are_the_first_two_of_more(finished):
    """What a seed does depends on nothing else; the comparison of other methods is another run."""
    other = run_mutual_information(replace(SMALL, seeds=1, methods=("random",)), finished[1], workers=1)
    value = other["methods"]["random"]["test_accuracy"]["values"][0]
    assert value == finished[0]["methods"]["random"]["test_accuracy"]["values"][0]
    assert other["run"] != finished[0]["run"] and other["information"] == {}
    assert other["verdict"] == "With 20 % of the neurons, mutual information was not among the methods."
    assert [f.name for f in drawn.figures(other)] == ["neuron_tickets", "neuron_overlap"]


def test_channels_with_batchnorm_in_global_scope(tmp_path):
    chosen = replace(SMALL, model="conv-bn-4", seeds=1, density=0.3, scope="global", budget="34it", methods=METHODS[:2])
    result = run_mutual_information(chosen, tmp_path, workers=1)
    assert result["neurons"] == {"conv1": 16, "conv2": 16, "conv3": 32, "conv4": 32}
    assert all(m["density"]["values"] == [round(0.3 * 96) / 96] for m in result["methods"].values())
    plan = Comparison(chosen, runs.Fit(chosen), tmp_path)
    watch = NeuronWatch(plan, model := plan.build(0))
    assert list(watch.norms) == plan.layers
    assert watch.penalty(model).item() == pytest.approx(1e-4 * 96)
    with torch.no_grad():
        model.bn2.weight[3] = -5
    assert watch.scores(model)["conv2"].argmax() == 3


def test_early_bird_draws_when_masks_have_settled():
    plan = Comparison(replace(SMALL, window=3, threshold=0.1), runs.Fit(SMALL), None)
    watch = NeuronWatch(plan, model := plan.build(0))
    assert not watch.norms  # an MLP without BatchNorm: by the size of the incoming weights

    def stir():
        with torch.no_grad():
            model.fc1.weight.normal_(generator=torch.Generator().manual_seed(watch.epochs))

    stir()
    drawn_at = []
    for epoch in range(1, 6):
        drawn_at.append(watch(model, epoch))
        if epoch == 1:
            stir()
    assert drawn_at == [False, False, False, True, True] and watch.distance == 0


# ---- the sentence ----


def numbers(**accuracies):
    """A result with the given (mean, half width) in percent."""
    value = {
        name: {"mean": m / 100, "ci95": None if h is None else h / 100, "values": [m / 100] * 3}
        for name, (m, h) in accuracies.items()
    }
    cost = {key: {"mean": 1.5, "ci95": 0, "values": []} for key in ("relative", "compute", "seconds")}
    methods = {
        name.replace("_", "-"): {"test_accuracy": v, "cost": cost, "weight_density": v}
        for name, v in value.items()
        if name != "dense"
    }
    overlap = {a: {b: {"mean": 1.0 if a == b else 0.2, "ci95": 0.1, "values": []} for b in methods} for a in methods}
    dense = (
        {"test_accuracy": value["dense"], "cost": {"seconds": cost["seconds"]}}
        if "dense" in value
        else {"cost": {"seconds": cost["seconds"]}}
    )
    return {
        "density": 0.1,
        "dense": dense,
        "methods": methods,
        "overlap": overlap,
        "chance_overlap": copy.deepcopy(overlap),
        "information": {},
    }


def test_verdict():
    text = drawn.verdict(
        numbers(dense=(97, 0.5), mutual_information=(94, 1), imp=(95.9, 1), magnitude=(97, 1), random=(90, 2))
    )
    assert text == (
        "With 10 % of the neurons, tickets by mutual information (94.00 ± 1.00 %, 1.5 times the dense training) are in test "
        "accuracy not measurably different from imp (95.90 ± 1.00 %, 1.5 times the dense training); below magnitude (97.00 ± "
        "1.00 %, 1.5 times the dense training); above random (90.00 ± 2.00 %, 1.5 times the dense training); below the dense "
        "network (97.00 ± 0.50 %). Intervals of 95 % over 3 seeds; where two overlap, no difference is claimed."
    )
    assert drawn.verdict(numbers(mutual_information=(94, None), imp=(90, None))).endswith(
        ": one seed allows no comparison."
    )
    assert " were compared with nothing." in drawn.verdict(numbers(mutual_information=(94, 1)))
    assert " not among " in drawn.verdict(numbers(imp=(94, 1)))


@pytest.mark.parametrize(
    ("mine", "other", "word"),
    [((95, 1), (93, 0.9), "above"), ((95, 1), (93, 1), "not measurably"), ((95, 1), (97.1, 1), "below")],
)
def test_overlapping_intervals_are_no_difference(mine, other, word):
    assert f" {word}" in drawn.verdict(numbers(mutual_information=mine, imp=other))


# ---- figures ----


def test_figures(finished):
    saved = analysis.read(folder_of(finished), "mutual-information")
    assert saved["command"].startswith("sparselottery mutual-information --data digits")
    made = analysis.figures("mutual-information", saved["numbers"])
    assert [f.name for f in made] == ["neuron_tickets", "neuron_overlap", "neuron_information"]
    accuracy, overlap, information = made
    assert [row[0] for row in accuracy.rows] == ["dense", *METHODS] and "keep 20 % of the neurons" in accuracy.caption
    mean = finished[0]["methods"]["imp"]["test_accuracy"]["mean"]
    assert accuracy.rows[3][1].startswith(f"{100 * mean:.2f} ± ")
    assert overlap.header == ["", *METHODS] and overlap.rows[0][1].startswith("100.0 ± 0.0 (chance 20.0)")
    assert [row[:2] for row in information.rows] == [["fc1", "300"], ["fc2", "100"]]
    assert information.rows[0][2] == f"{finished[0]['information']['fc1']['mean'][0]:.3f}"
    assert drawn.figures(saved["numbers"])[0].png == accuracy.png
    one = numbers(mutual_information=(94, None), imp=(90, None))
    assert len(drawn.figures(one)) == 2


# ---- the command ----


def test_command(finished, capsys):
    result = run_mutual_information(SMALL, finished[1], workers=1)
    assert main(["mutual-information", *OPTIONS, "--out", str(finished[1]), "--no-report", "--json"]) == 0
    captured = capsys.readouterr()
    shown = json.loads(captured.out.splitlines()[-1])
    assert shown == json.loads(json.dumps(result)) and not (folder_of(finished) / "report.html").exists()
    assert (
        "neurons shared" in captured.err
        and shown["verdict"] in captured.err
        and "12 of them done before" in captured.err
    )


def test_report(finished, capsys):
    assert main(["mutual-information", *OPTIONS, "--out", str(finished[1])]) == 0
    printed = capsys.readouterr().out
    page = (folder_of(finished) / "report.html").read_text()
    assert finished[0]["verdict"] in printed and f"report: {folder_of(finished)}" in printed
    assert html.escape(finished[0]["verdict"]) in page and page.count("data:image/png;base64,") == 3
    assert "sparselottery mutual-information --data digits" in page and "chance 20.0" in page
    pictures = {path.name for path in folder_of(finished).glob("analysis/*.png")}
    assert pictures == {"neuron_tickets.png", "neuron_overlap.png", "neuron_information.png"}


def test_help():
    done = subprocess.run(
        [sys.executable, "-m", "sparselottery", "mutual-information", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "examples:" in done.stdout and "--fraction" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--density 0", "density: expected a number above 0 and below 1, got 0"),
        ("--density 1", "density: expected a number above 0 and below 1, got 1"),
        ("--fraction 0", "fraction: expected a number above 0"),
        ("--rate 1", "rate: expected a number above 0 and below 1"),
        ("--threshold 0", "threshold: expected a number above 0"),
        ("--validation 0", "validation: expected examples to probe"),
        ("--bins 1", "bins: expected at least 2"),
        ("--methods magic", "methods: expected any of"),
        ("--methods imp,imp", "methods: expected any of"),
        ("--window 99", "window: expected at most the 2 whole epochs"),
        ("--window 1", "window: expected at least 2"),
        ("--seeds 0", "seeds: expected 1 to"),
        ("--scope block", "argument --scope: invalid choice"),
        ("--data mnist --data-root nowhere", "no such folder"),
    ],
)
def test_mistakes(options, message, tmp_path, capsys):
    arguments = ["mutual-information", *OPTIONS, *options.split(), "--out", str(tmp_path)]
    try:
        status = main(arguments)
    except SystemExit as left:
        status = left.code
    errors = capsys.readouterr().err
    assert status == 2 and message in errors and len(errors.splitlines()) == 1
    assert not list(tmp_path.iterdir())
