"""What a ticket forgets: accuracy class by class, and the examples on which sparse networks disagree with dense ones.

After Hooker et al., "What Do Compressed Deep Neural Networks Forget?" (arXiv 1911.05248) and "Characterising Bias in Compressed
Models" (arXiv 2010.03058). Over a population of seeds, each with its dense network and its ticket:

    change     accuracy of the tickets minus that of the dense networks on the examples of a class, with Student's 95 %
               interval over the seeds; a seed's two networks start from the same values, so that they are compared in pairs
    excess     the same after the change over all examples is taken off (the papers' normalization), with the p-value of its
               t-test and that value after Holm's correction for as many tests as there are classes
    exemplars  test examples for which the label that most tickets give is not the label that most dense networks give
               (compression-identified exemplars); ties go to the larger mean probability

How many exemplars chance alone would give: dense and ticket are exchanged within seeds, in every combination up to
`EXCHANGES` of them; "expected" is the mean number over these, "p" the fraction with at least as many as observed.
Intervals and tests speak of other seeds on these test examples, not of other examples.
"""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..tickets.controls import derived_seed
from ..tickets.result import interval
from .figure import BLUE, GREEN, ORANGE, WIDTH, Figure, number, panels, render
from .figure import interval as cell

EXCHANGES = 1024
MOST_SHOWN = 24  # images on the sheet
MOST_ROWS = 100  # of the table of exemplars; the numbers hold all
LEVEL = 0.05


def class_damage(dense: Tensor, ticket: Tensor, labels: Tensor, classes: int) -> dict:
    """Damage by class and compression-identified exemplars.

    Args:
        dense, ticket: probabilities [seeds, N, classes] of each seed's two networks on N examples.
        labels: int64 [N].

    Returns:
        {"overall": {"dense", "ticket", "change"}, "classes": [{"class", "examples", "dense", "ticket", "change", "excess", "p",
        "p_holm"}], "exemplars": {"count", "expected", "p", "exchanges", "indices", "dense", "ticket", "dense_votes",
        "ticket_votes", "accuracy": {"exemplars": {"dense", "ticket"}, "others": {...}}}}; statistics are
        {"mean", "ci95", "values"}. A class without examples has None.

    Raises:
        ValueError: fewer than two seeds, shapes that do not fit, labels that are no class, or probabilities that are not finite.
    """
    if dense.shape != ticket.shape or dense.ndim != 3 or dense.shape[1:] != (len(labels), classes):
        raise ValueError(
            f"dense, ticket: expected probabilities [seeds, {len(labels)}, {classes}], got {list(dense.shape)} and "
            f"{list(ticket.shape)}"
        )
    if len(dense) < 2:
        raise ValueError(f"seeds: class damage compares populations and needs at least 2 seeds, got {len(dense)}")
    if not len(labels):
        raise ValueError("labels: expected at least one example, got none")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"labels: expected classes 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}")
    for name, value in (("dense", dense), ("ticket", ticket)):
        bad = [i for i, one in enumerate(value) if not bool(torch.isfinite(one).all())]
        if bad:
            raise ValueError(f"{name}: the outputs of seed number {bad[0]} are not finite: its training has diverged")
    right = torch.stack([(p.argmax(-1) == labels).double() for p in (dense, ticket)])  # [2, seeds, N]
    change = (right[1] - right[0]).mean(1)
    found = []
    for c in range(classes):
        here = labels == c
        entry = {"class": c, "examples": int(here.sum())}
        if entry["examples"]:
            mine = right[:, :, here].mean(2)
            excess = mine[1] - mine[0] - change
            entry |= {
                "dense": interval(mine[0].tolist()),
                "ticket": interval(mine[1].tolist()),
                "change": interval((mine[1] - mine[0]).tolist()),
                "excess": interval(excess.tolist()),
                "p": t_test(excess.tolist()),
            }
        else:
            entry |= dict.fromkeys(("dense", "ticket", "change", "excess", "p"))
        found.append(entry)
    for entry, p in zip(found, holm([entry["p"] for entry in found]), strict=True):
        entry["p_holm"] = p
    overall = {"dense": interval(right[0].mean(1).tolist()), "ticket": interval(right[1].mean(1).tolist())}
    overall["change"] = interval(change.tolist())
    return {"overall": overall, "classes": found, "exemplars": _exemplars(dense, ticket, labels, right)}


def t_test(values: Sequence[float]) -> float | None:
    """p-value (two sides) of Student's t-test for a mean of 0; values that are all equal: 1 for zeros, else None (undefined)."""
    n = len(values)
    mean = math.fsum(values) / n
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    if math.sqrt(variance) <= 1e-12:  # rounding of fractions aside, all the same
        return 1.0 if abs(mean) <= 1e-12 else None
    from scipy.special import stdtr  # comes with scikit-learn; takes a while to import

    return min(1.0, 2 * float(stdtr(n - 1, -abs(mean) / math.sqrt(variance / n))))


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction of p-values for multiple tests; None stays None and is no test."""
    order = sorted((p, i) for i, p in enumerate(values) if p is not None)
    found: list[float | None] = [None] * len(values)
    least = 0.0
    for rank, (p, i) in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p))
        found[i] = least
    return found


def modal_labels(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """The label most networks of a population give to each example, and how many do.

    probabilities: [networks, N, classes]. Ties go to the label with the larger mean probability, then to the lower one.
    """
    votes = torch.nn.functional.one_hot(probabilities.argmax(-1), probabilities.shape[-1]).sum(0)
    modal = (votes + 0.5 * probabilities.double().mean(0)).argmax(-1)  # a mean probability is at most 1: half a vote
    return modal, votes.gather(-1, modal[:, None])[:, 0]


def _exemplars(dense: Tensor, ticket: Tensor, labels: Tensor, right: Tensor) -> dict:
    modal, votes = zip(*(modal_labels(p) for p in (dense, ticket)), strict=True)
    differing = modal[0] != modal[1]
    indices = differing.nonzero()[:, 0]
    counts = []
    exchanges = _exchanges(len(dense))
    for swap in exchanges:
        chosen = torch.tensor(swap)[:, None, None]
        pair = torch.where(chosen, ticket, dense), torch.where(chosen, dense, ticket)
        counts.append(int((modal_labels(pair[0])[0] != modal_labels(pair[1])[0]).sum()))
    accuracy = {}
    for name, here in (("exemplars", differing), ("others", ~differing)):
        some = bool(here.any())
        accuracy[name] = {
            which: interval(right[i][:, here].mean(1).tolist()) if some else None
            for i, which in enumerate(("dense", "ticket"))
        }
    return {
        "count": len(indices),
        "expected": math.fsum(counts) / len(counts),
        "p": sum(c >= len(indices) for c in counts) / len(counts),
        "exchanges": len(counts),
        "indices": indices.tolist(),
        "label": labels[indices].tolist(),
        "dense": modal[0][indices].tolist(),
        "ticket": modal[1][indices].tolist(),
        "dense_votes": votes[0][indices].tolist(),
        "ticket_votes": votes[1][indices].tolist(),
        "accuracy": accuracy,
    }


def _exchanges(seeds: int) -> list[tuple[bool, ...]]:
    """Which seeds exchange their networks: every combination (the first seed stays, its mirror image counts the same), or
    the one observed and `EXCHANGES` - 1 random ones."""
    if 2 ** (seeds - 1) <= EXCHANGES:
        return [(False, *rest) for rest in itertools.product((False, True), repeat=seeds - 1)]
    generator = torch.Generator().manual_seed(derived_seed("exchanges", seeds))
    drawn = torch.rand(EXCHANGES - 1, seeds, generator=generator) < 0.5
    return [(False,) * seeds, *map(tuple, drawn.tolist())]


def pictures(x: Tensor, indices: Sequence[int]) -> dict | None:
    """Images of a data set as JSON, `MOST_SHOWN` at most: {"shape": [height, width, channels], "pixels": [base64, ...]}.

    x: [N, channels, height, width], 1 or 3 channels; None for data that are no images. Each channel is brought to 0..255 by its
    extremes in the data set.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        return None
    low, high = x.amin((0, 2, 3)).view(-1, 1, 1), x.amax((0, 2, 3)).view(-1, 1, 1)
    found = []
    for i in list(indices)[:MOST_SHOWN]:
        bright = ((x[i] - low) / (high - low).clamp_min(1e-12) * 255).round().clamp(0, 255).byte().permute(1, 2, 0)
        found.append(base64.b64encode(bright.contiguous().cpu().numpy().tobytes()).decode())
    return {"shape": [x.shape[2], x.shape[3], x.shape[1]], "pixels": found}


# ---- figures ----


def figures(numbers: Mapping) -> list[Figure]:
    classes = [entry for entry in numbers["classes"] if entry["examples"]]
    overall, seeds, density = numbers["overall"], len(numbers["seeds"]), 100 * numbers["density"]

    def draw(canvas):
        (axes,) = panels(canvas)
        at = range(len(classes))
        for i, entry in zip(at, classes, strict=True):
            change = entry["change"]
            loud = entry["p_holm"] is not None and entry["p_holm"] < LEVEL
            style = {"color": ORANGE, "marker": "s"} if loud else {"color": BLUE, "marker": "o"}
            axes.errorbar(100 * change["mean"], i, xerr=100 * change["ci95"], capsize=2, ms=4, lw=1.3, **style)
        mean, half = 100 * overall["change"]["mean"], 100 * overall["change"]["ci95"]
        axes.axvspan(mean - half, mean + half, color=GREEN, alpha=0.15, lw=0)
        axes.axvline(mean, color=GREEN, ls="--", lw=1, label="all classes together")
        axes.axvline(0, color="0.4", lw=0.8)
        axes.set_yticks(list(at), [str(entry["class"]) for entry in classes])
        axes.invert_yaxis()
        axes.set(xlabel="change of accuracy, percentage points", ylabel="class")
        axes.legend(frameon=False, loc="best")

    loud = [str(e["class"]) for e in classes if e["p_holm"] is not None and e["p_holm"] < LEVEL]
    caption = (
        f"Accuracy of the ticket with {density:.1f} % of the weights minus the dense network's, class by class: mean and 95 % "
        f"interval over {seeds} seeds, on {sum(e['examples'] for e in classes)} test examples, as training left the networks "
        "(Hooker et al. 2019, 2020). "
    )
    caption += (
        f"Classes {', '.join(loud)} (squares) change otherwise than the network as a whole (p < {LEVEL} after Holm's correction)."
        if loud
        else f"No class changes otherwise than the network as a whole (p < {LEVEL} after Holm's correction for "
        f"{len(classes)} tests)."
    )
    header = ["class", "examples", "dense %", "ticket %", "change, points", "beyond overall", "p", "p, Holm"]
    rows = [
        [
            "all",
            str(sum(e["examples"] for e in classes)),
            *(_percent(overall[k]) for k in ("dense", "ticket", "change")),
        ]
    ]
    rows[0] += ["–"] * 3
    for entry in classes:
        cells = [_percent(entry[key]) for key in ("dense", "ticket", "change", "excess")]
        rows.append([str(entry["class"]), str(entry["examples"]), *cells, _p(entry["p"]), _p(entry["p_holm"])])
    png = render(draw, (WIDTH, max(2.4, min(14.0, 0.9 + 0.27 * len(classes)))))
    found = [Figure("class_damage", "Damage by class", caption, png, header, rows)]
    return [*found, _sheet(numbers)]


def _sheet(numbers) -> Figure:
    """The exemplars: as images where the data are images, else as a bar chart of accuracies."""
    exemplars, density = numbers["exemplars"], 100 * numbers["density"]
    shown = numbers.get("pictures")
    accuracy = exemplars["accuracy"]
    caption = (
        f"{exemplars['count']} of {numbers['examples']} test examples get another label from most tickets ({density:.1f} %) than "
        f"from most dense networks; exchanging the two within seeds gives {exemplars['expected']:.1f} on average "
        f"(p = {exemplars['p']:.3f}, {exemplars['exchanges']} exchanges). "
    )
    for name, phrase in (("exemplars", "Mean accuracy on them"), ("others", "On the others")):
        if accuracy[name]["dense"] is not None:
            dense, ticket = (number(accuracy[name][which]["mean"], 1, 100) for which in ("dense", "ticket"))
            caption += f"{phrase}: dense {dense} %, ticket {ticket} %. "
    header = ["test example", "label", "dense says", "votes", "ticket says", "votes"]
    columns = [exemplars[k] for k in ("indices", "label", "dense", "dense_votes", "ticket", "ticket_votes")]
    rows = [list(map(str, row)) for row in zip(*columns, strict=True)][:MOST_ROWS]
    if shown and shown["pixels"]:
        png = render(
            lambda canvas: _images(canvas, shown, exemplars), (WIDTH, 0.1 + 1.15 * math.ceil(len(shown["pixels"]) / 6))
        )
        if len(shown["pixels"]) < exemplars["count"]:
            caption += (
                f"The first {len(shown['pixels'])} are shown: what it is, what dense networks say → what tickets say."
            )
        else:
            caption += "Shown: what it is, what dense networks say → what tickets say."
    else:

        def draw(canvas):
            (axes,) = panels(canvas)
            for i, (which, colour) in enumerate((("dense", BLUE), ("ticket", ORANGE))):
                for j, name in enumerate(("exemplars", "others")):
                    if accuracy[name][which] is not None:
                        value = accuracy[name][which]
                        label = which if j == 1 else None
                        axes.bar(j + 0.38 * (i - 0.5), 100 * value["mean"], 0.36, color=colour, label=label)
            axes.set_xticks([0, 1], [f"exemplars ({exemplars['count']})", "all others"])
            axes.set_ylabel("test accuracy, %")
            axes.legend(frameon=False, loc="lower right")

        png = render(draw, (WIDTH, 2.6))
    if len(rows) < exemplars["count"]:
        caption += f" The table lists the first {len(rows)}."
    return Figure("exemplars", "Compression-identified exemplars", caption, png, header, rows)


def _images(canvas, shown, exemplars) -> None:
    import numpy as np

    height, width, channels = shown["shape"]
    grid = canvas.subplots(math.ceil(len(shown["pixels"]) / 6), 6, squeeze=False).flat
    for i, axes in enumerate(grid):
        axes.set_axis_off()
        if i < len(shown["pixels"]):
            pixels = np.frombuffer(base64.b64decode(shown["pixels"][i]), np.uint8).reshape(height, width, channels)
            axes.imshow(pixels if channels == 3 else pixels[:, :, 0], cmap=None if channels == 3 else "gray")
            label, dense, ticket = (exemplars[key][i] for key in ("label", "dense", "ticket"))
            axes.set_title(f"is {label}\n{dense} → {ticket}", fontsize=8.5)


def _percent(statistic) -> str:
    return "–" if statistic is None else cell(statistic["mean"], statistic["ci95"], 2, 100)


def _p(value: float | None) -> str:
    return "–" if value is None else ("<0.001" if value < 0.001 else f"{value:.3f}")
