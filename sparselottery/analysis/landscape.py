"""The loss around a trained network along two filter-normalized random directions (Li et al. 2018, arXiv 1712.09913).

f(a, b) = L(θ + a δ + b η), section 4: δ and η are Gaussian, and every filter of theirs (the weights into one channel or neuron)
is given the norm of that filter of θ, so that the landscapes of networks of different scale can be compared. Biases and
normalization layers stay where they are, as in the paper's code; BatchNorm uses the running statistics of θ.

For a ticket the directions are those of the dense network times its mask, and normalized to its own filters: the landscape is
that of the space it is trained in, where a pruned weight is not a direction. Both are drawn on one scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.linear import is_transposed_linear
from ..tickets.controls import derived_seed
from .figure import BLUE, ORANGE, WIDTH, Figure, number, panels, render
from .points import MEMORY, Points

RINGS = (0.25, 0.5, 0.75, 1.0)


def directions(model: nn.Module, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two directions in the space of a network's weights.

    Args:
        model: masked or plain; masked layers get directions that are 0 wherever their mask is.
        seed: networks of one architecture and seed get the same draws, whatever their values and masks.

    Returns:
        δ and η: parameter name -> tensor of its shape, for every parameter of two or more dimensions. Each filter (index along
        the first dimension; the second of transformers' Conv1D) has the norm of the weights' filter.
    """
    found = ({}, {})
    transposed = {id(m.weight) for m in model.modules() if is_transposed_linear(m)}
    masks = {id(m.weight): m.mask for m in model.modules() if hasattr(m, "weight_mask") and hasattr(m, "mask")}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2 or not weight.is_floating_point():
                continue
            for i, direction in enumerate(found):
                generator = torch.Generator().manual_seed(derived_seed("landscape", seed, i, name))
                draw = torch.randn(weight.shape, generator=generator).to(weight)
                if id(weight) in masks:
                    draw = draw * masks[id(weight)].to_dense()
                along = 1 if id(weight) in transposed else 0
                rest = [d for d in range(weight.ndim) if d != along]
                norm = torch.linalg.vector_norm(draw, dim=rest, keepdim=True)
                # A filter without weights left has no direction: 0, not 0 / 0.
                scale = torch.linalg.vector_norm(weight, dim=rest, keepdim=True) / norm.clamp_min(
                    torch.finfo(norm.dtype).tiny
                )
                direction[name] = draw * torch.where(norm > 0, scale, 0.0)
    return found


class Plane:
    """The loss of one network on a grid around it.

    Args:
        model: trained. x [N, *], y [N]: the examples the loss is taken on.
        seed: of the directions. resolution: points along each side, odd so that the network itself is one. extent: the
            coordinates go from -extent to extent, in units of the filters' norms.
        loss, memory, at_once: see `Points`.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        seed: int = 0,
        resolution: int = 21,
        extent: float = 1.0,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        memory: int = MEMORY,
        at_once: int | None = None,
    ):
        if isinstance(resolution, bool) or not isinstance(resolution, int):
            raise TypeError(f"resolution: expected an int, got {type(resolution).__name__}")
        if resolution < 3 or resolution % 2 == 0:
            raise ValueError(f"resolution: expected an odd number of at least 3, got {resolution}")
        if not (isinstance(extent, int | float) and math.isfinite(extent) and extent > 0):
            raise ValueError(f"extent: expected a number above 0, got {extent!r}")
        self.points = Points(model, x, y, loss=loss, memory=memory, at_once=at_once)
        self.first, self.second = directions(model, seed)
        self.center = {name: dict(model.named_parameters())[name].detach().clone() for name in self.first}
        self.axis = torch.linspace(-extent, extent, resolution, dtype=torch.float64)
        self.coordinates = torch.cartesian_prod(self.axis, self.axis)

    def states(self, coordinates: Tensor) -> dict[str, Tensor]:
        """The weights at coordinates [P, 2]: name -> [P, ...]."""
        found = {}
        for name, center in self.center.items():
            a, b = (c.to(center).view(-1, *[1] * center.ndim) for c in coordinates.unbind(1))
            found[name] = center + a * self.first[name] + b * self.second[name]
        return found

    def cost(self) -> float:
        """Seconds that `losses` will take, measured on one chunk."""
        return self.points.cost(self.states, self.coordinates)

    def losses(self, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """float64 [resolution, resolution]: rows along the first direction, columns along the second."""
        return self.points(self.states, self.coordinates, progress)[0].view(len(self.axis), len(self.axis))


def numbers(planes: Mapping[str, Plane], losses: Mapping[str, Tensor], about: Mapping) -> dict:
    """What `figures` draws. planes, losses: by "dense" and "ticket"; `about`: further entries (density, seed, ...)."""
    return {
        **about,
        "axis": next(iter(planes.values())).axis.tolist(),
        "examples": len(next(iter(planes.values())).points.y),
        "loss": {name: value.tolist() for name, value in losses.items()},
        "points_at_once": {name: plane.points.at_once for name, plane in planes.items()},
    }


def rings(axis: list[float], losses: list[list[float | None]]) -> list[float | None]:
    """Mean loss at the network and at `RINGS` times the extent from it, over the grid points nearest to each circle.

    None where such a point is not finite.
    """
    step = axis[1] - axis[0]
    found = []
    for ring in (0.0, *RINGS):
        radius = ring * axis[-1]
        near = [
            losses[i][j]
            for i, a in enumerate(axis)
            for j, b in enumerate(axis)
            if abs(math.hypot(a, b) - radius) <= step / 2 + 1e-9 and (ring or (abs(a) < step / 2 and abs(b) < step / 2))
        ]
        found.append(None if None in near else math.fsum(near) / len(near))
    return found


def figures(numbers: Mapping) -> list[Figure]:
    axis, losses = numbers["axis"], numbers["loss"]
    names = [name for name in ("dense", "ticket") if name in losses]
    heading = {"dense": "dense", "ticket": f"ticket, {100 * numbers['density']:.1f} %"}
    finite = [v for name in names for row in losses[name] for v in row if v is not None]
    if not finite:
        raise ValueError(
            "analysis/landscape.json: no point of the landscape has a finite loss; the networks have diverged"
        )
    scale = _Scale(min(finite), max(finite))

    def surfaces(canvas):
        for i, name in enumerate(names):
            axes = canvas.add_subplot(1, len(names), i + 1, projection="3d")
            x, y, z = scale.grid(axis, losses[name])
            axes.plot_surface(x, y, z, cmap="viridis", vmin=scale.low, vmax=scale.high, rstride=1, cstride=1, lw=0)
            axes.set_zlim(scale.low, scale.high)
            axes.set_title(heading[name], pad=0)
            ends = [axis[0], 0.0, axis[-1]]
            axes.set_xticks(ends, [f"{t:g}" for t in ends])
            axes.set_yticks(ends, [f"{t:g}" for t in ends])
            axes.set_zticks(scale.ticks, scale.tick_labels)
            axes.tick_params(pad=-2, labelsize=8)
            axes.view_init(elev=28, azim=-55)
            axes.set_box_aspect((1, 1, 0.75), zoom=0.95)
        canvas.supxlabel("height: loss; below: the two directions", fontsize=9)

    def contours(canvas):
        all_axes = panels(canvas, 1, len(names), sharex=True, sharey=True)
        levels = [scale.low + (scale.high - scale.low) * i / 14 for i in range(15)]
        for axes, name in zip(all_axes, names, strict=True):
            x, y, z = scale.grid(axis, losses[name])
            drawn = axes.contourf(x, y, z, levels=levels, cmap="viridis")
            axes.contour(x, y, z, levels=levels, colors="white", linewidths=0.4, alpha=0.7)
            axes.plot(0, 0, "+", color="white", ms=8, mew=1.5)
            axes.set_aspect("equal")
            axes.set(title=heading[name], xlabel="first direction")
        all_axes[0].set_ylabel("second direction")
        bar = canvas.colorbar(drawn, ax=all_axes, location="bottom", label="loss", shrink=0.8)
        bar.set_ticks(scale.ticks, labels=scale.tick_labels)

    def profile(canvas):
        (axes,) = panels(canvas)
        for name, colour, marker in zip(names, (BLUE, ORANGE), "os", strict=False):
            points = [(r, v) for r, v in zip((0.0, *RINGS), rings(axis, losses[name]), strict=True) if v is not None]
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=heading[name]) if points else None
        axes.set_yscale("log" if scale.logarithmic else "linear")
        axes.set(xlabel="distance from the network, in norms of its filters", ylabel="mean loss")
        axes.legend(frameon=False)

    how = (
        f"Loss on {numbers['examples']} training examples around seed {numbers['seed']}'s networks along two filter-normalized "
        "random directions (Li et al. 2018); the ticket's lie inside its mask. One scale for both"
        + (" (logarithmic)." if scale.logarithmic else ".")
    )
    header = ["distance", *(heading[name] for name in names)]
    profiles = [rings(axis, losses[name]) for name in names]
    rows = [[f"{ring * axis[-1]:g}", *(number(p[i], 4) for p in profiles)] for i, ring in enumerate((0.0, *RINGS))]
    gone = [sum(v is None for row in losses[name] for v in row) for name in names]
    if any(gone):
        rows.append(["points not finite", *map(str, gone)])
    sheet = _sheet(axis, {heading[name]: losses[name] for name in names})
    return [
        Figure("landscape_surface", "Loss landscape", how, render(surfaces, (WIDTH, 2.9)), header, rows),
        Figure("landscape_contours", "Loss landscape, contours", how, render(contours, (WIDTH, 3.35)), *sheet),
        Figure(
            "landscape_profile",
            "How fast the loss rises",
            "Mean loss over the grid points nearest to a circle around the network.",
            render(profile),
            header,
            rows,
        ),
    ]


def _sheet(axis, losses) -> tuple[list[str], list[list[str]]]:
    """The losses along the two axes of the plane: what can be read of a contour plot without thousands of cells."""
    middle = len(axis) // 2
    header = ["coordinate", *(f"{name}, along {which}" for name in losses for which in ("first", "second"))]
    rows = []
    for i, a in enumerate(axis):
        cells = [(grid[i][middle], grid[middle][i]) for grid in losses.values()]
        rows.append([f"{0.0 if i == middle else a:.2f}", *(number(v, 4) for pair in cells for v in pair)])
    return header, rows


class _Scale:
    """The scale of losses both pictures share: logarithmic where they span more than a factor of 30."""

    def __init__(self, low: float, high: float):
        self.logarithmic = low > 0 and high > 30 * low
        self.low, self.high = (self._to(low), self._to(high))
        if self.high <= self.low:
            self.high = self.low + max(1e-6, abs(self.low) * 1e-3)
        if self.logarithmic:
            first, last = math.floor(self.low), math.ceil(self.high)
            steps = (1, 3) if last - first < 4 else (1,)
            wanted = [s * 10.0**e for e in range(first, last + 1) for s in steps]
            self.ticks = [self._to(v) for v in wanted if self.low <= self._to(v) <= self.high]
            self.tick_labels = [f"{10**t:.2g}" for t in self.ticks]
        else:
            self.ticks = [self.low + (self.high - self.low) * i / 4 for i in range(5)]
            self.tick_labels = [f"{t:.2g}" for t in self.ticks]

    def _to(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value

    def grid(self, axis, losses):
        """x, y, z as numpy arrays [n, n]; what is not finite is masked."""
        import numpy as np

        x, y = np.meshgrid(axis, axis, indexing="ij")
        z = np.array([[math.nan if v is None else self._to(v) for v in row] for row in losses])
        return x, y, np.ma.masked_invalid(z)
