"""A figure as a value: a picture with the table of what it shows, and how all pictures of the package are drawn.

Pictures are drawn at most `WIDTH` inches wide with letters of nine or ten points, so that they can be read when a phone scales
them to its width; what needs more panels is several figures, or panels one below the other.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field

WIDTH, HEIGHT = 5.0, 3.6  # inches
DPI = 192
# Okabe & Ito (2008): told apart without colour vision; use markers or dashes beside them for grey print.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, AMBER, YELLOW, BLACK = "#56B4E9", "#E69F00", "#F0E442", "#000000"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER, BLACK, YELLOW)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
}


@dataclass
class Figure:
    """A picture and its table.

    Attributes:
        name: a file name without ending, lower case: the picture is written as `<name>.png`.
        title: a line. caption: one or two sentences that say what is seen and how it was computed.
        png: the picture's bytes, as `render` gives them.
        header, rows: the table, cells as text; every row as long as the header.

    Raises:
        ValueError: one of them is not so.
    """

    name: str
    title: str
    caption: str
    png: bytes = field(repr=False)
    header: list[str]
    rows: list[list[str]] = field(repr=False)

    def __post_init__(self):
        if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", self.name):
            raise ValueError(f"name: expected lower-case letters, digits, - and _, got {self.name!r}")
        if not self.png.startswith(b"\x89PNG"):
            raise ValueError(f"png: expected the bytes of a PNG picture, got {self.png[:8]!r}")
        for i, row in enumerate(self.rows):
            if len(row) != len(self.header):
                raise ValueError(f"rows[{i}]: expected {len(self.header)} cells like the header, got {len(row)}")


def render(draw: Callable, size: tuple[float, float] = (WIDTH, HEIGHT)) -> bytes:
    """A PNG of `size` inches (width, height).

    Args:
        draw: called with an empty `matplotlib.figure.Figure`; `panels(figure, ...)` gives it axes in the house style.

    The same calls give the same bytes. No display is needed, and nothing of matplotlib's global state is used or changed.
    """
    import matplotlib
    from matplotlib.figure import Figure as Canvas  # no pyplot: no global state, safe beside a user's own plots

    style = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"} | _STYLE
    with matplotlib.rc_context(style):
        canvas = Canvas(figsize=size, layout="constrained")
        draw(canvas)
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def panels(canvas, rows: int = 1, columns: int = 1, **settings) -> list:
    """Axes with a light grid and two spines, row by row. `settings`: those of matplotlib's `Figure.subplots`."""
    found = list(canvas.subplots(rows, columns, squeeze=False, **settings).flat)
    for axes in found:
        axes.grid(True, alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return found


def number(value: float | None, digits: int = 3, scale: float = 1.0) -> str:
    """A cell: `digits` digits after the point; a dash for None (not measured, not defined)."""
    return "–" if value is None else f"{value * scale:.{digits}f}"


def interval(mean: float | None, half: float | None, digits: int = 2, scale: float = 1.0) -> str:
    """A cell: mean ± half width of its interval; the mean alone where there is no interval."""
    if mean is None:
        return "–"
    return f"{mean * scale:.{digits}f}" + ("" if half is None else f" ± {half * scale:.{digits}f}")
