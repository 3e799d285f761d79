"""The figures of a report: arrays in, matplotlib figures out; no file is read, nothing is computed.

A figure is drawn by a function without arguments, once in light colours and once in dark ones, see
`render`. Layers are dicts by name, in the order in which they are shown.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Drawing = Callable[[], Figure]
Line = tuple[Sequence[float], Sequence[float]]

DPI = 110
WIDTH = 9.0
"""Inches, of every figure."""

COLUMNS = 300
"""Most steps that a map over time shows: more than a screen has pixels for them."""

ROWS = 8
"""Most layers in figures that have a row of small pictures for each; evenly spaced ones else."""

LARGEST_LIFT = 4.0
"""Where the colours of shares end: what is larger has the colour of this."""

LEAST_SPAN = 1e-5
"""Of an axis that is not logarithmic."""

_BALANCE = "RdBu_r"


def _colors(text: str, line: str, back: str) -> Any:
    names = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    backs = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor")
    lines = ("axes.edgecolor", "grid.color", "legend.edgecolor")
    return (
        dict.fromkeys(names, text) | dict.fromkeys(backs, back) | dict.fromkeys(lines, line)
    ) | {
        "font.size": 8.5,
        "axes.titlesize": 9.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.alpha": 0.4,
        "svg.fonttype": "none",
    }


THEMES = {
    "light": _colors("#1f2328", "#9aa4af", "#ffffff"),
    "dark": _colors("#e6edf3", "#57606a", "#161b22"),
}
"""matplotlib settings of the two colour schemes; backgrounds are those of the page's cards."""


class Panel(NamedTuple):
    """One diagram of `curves`.

    Attributes:
        title: what it shows.
        lines: (steps, values) by name.
        reference: a horizontal line, dashed.
        log: whether the axis is logarithmic.
    """

    title: str
    lines: Mapping[str, Line]
    reference: float | None = None
    log: bool = False


def render(draw: Drawing, theme: str) -> bytes:
    """A figure as PNG, in the colours of a theme.

    Args:
        draw: makes it.
        theme: a key of `THEMES`.
    """
    with matplotlib.rc_context(THEMES[theme]):
        figure = draw()
        FigureCanvasAgg(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def line_colors(count: int) -> list[Any]:
    """Colours of lines: distinct ones for few, a scale from first to last for many."""
    if count <= 10:
        return [matplotlib.colormaps["tab10"](i) for i in range(count)]
    return [matplotlib.colormaps["viridis"](x) for x in np.linspace(0.15, 0.9, count)]


def expert_colors(count: int) -> np.ndarray:
    """[E,3] colours that tell experts apart, in [0,1]."""
    if count <= 10:
        return np.array([matplotlib.colormaps["tab10"](i)[:3] for i in range(count)])
    turn = (np.arange(count) * 0.61803398875) % 1.0  # golden ratio: neighbours differ most
    return np.array([matplotlib.colormaps["hsv"](x)[:3] for x in turn])


def curves(panels: Sequence[Panel], columns: int = 2) -> Figure:
    """Lines over training, a diagram for each panel, one legend."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = _grid(rows, columns, height=2.5)
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colors = dict(zip(names, line_colors(len(names)), strict=True))
    for axis, panel in zip(axes, panels, strict=False):
        for name, (steps, values) in panel.lines.items():
            marker = "o" if len(steps) < 3 else None
            axis.plot(steps, values, color=colors[name], label=name, lw=1.3, marker=marker, ms=3.0)
        if panel.reference is not None:
            axis.axhline(panel.reference, ls="--", lw=1.0, color=matplotlib.rcParams["text.color"])
        if panel.log:
            axis.set_yscale("log")
        _widen(axis, panel.log)
        axis.set_title(panel.title, loc="left")
        _steps(axis)
        axis.grid(True)
    _hide_empty(axes)
    if len(names) > 1:
        shown = {h.get_label(): h for axis in axes for h in axis.get_lines()}
        picked = _spread(names, 10)
        handles = [shown[name] for name in picked]
        figure.legend(handles, picked, loc="outside lower center", ncols=min(len(picked), 6))
    return figure


def loads_over_time(layers: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """A map for each layer: steps to the right, experts downwards, colour is E times the load.

    Args:
        layers: steps [n] and shares [n,E] of each layer.
    """
    columns = min(2, len(layers))
    E = next(iter(layers.values()))[1].shape[1]
    figure, axes = _grid(-(-len(layers) // columns), columns, height=1.1 + min(0.09 * E, 2.0))
    norm = _norm([loads * E for _, loads in layers.values()], 1.0)
    for axis, (name, (steps, loads)) in zip(axes, layers.items(), strict=False):
        kept = _spread(range(len(steps)), COLUMNS)
        at, shares = steps[kept].astype(float), loads[kept].T * loads.shape[1]
        mesh = axis.pcolormesh(
            _edges(at), np.arange(shares.shape[0] + 1) - 0.5, shares, cmap=_BALANCE, norm=norm
        )
        axis.invert_yaxis()
        axis.set_title(name, loc="left")
        _steps(axis)
        axis.set_ylabel("expert")
        _whole_ticks(axis, shares.shape[0])
    _colorbar(figure, mesh, axes, "load over fair share")
    return figure


def maps(
    layers: Mapping[str, np.ndarray],
    *,
    label: str,
    xlabel: str,
    center: float = 1.0,
    xticks: Sequence[str] | None = None,
    ylabel: str = "expert",
    yticks: Sequence[str] | None = None,
    columns: int = 2,
) -> Figure:
    """A matrix in colours for each layer, its values written in where there is room.

    Args:
        layers: [rows, columns] each.
        label: of the colour scale.
        xlabel: what the columns are.
        center: the value that is white: 1 of shares over the fair one, 0 of cosines.
        xticks: names of the columns; numbers where omitted.
        ylabel: what the rows are.
        yticks: names of the rows.
        columns: diagrams beside each other.
    """
    columns = min(columns, len(layers))
    E, N = next(iter(layers.values())).shape
    height = min(max(0.24 * E, 1.2), 4.5) + (1.5 if xticks else 0.8)
    figure, axes = _grid(-(-len(layers) // columns), columns, height=height)
    norm = _norm(list(layers.values()), center)
    for axis, (name, values) in zip(axes, layers.items(), strict=False):
        image = axis.imshow(
            np.ma.masked_invalid(values), cmap=_BALANCE, norm=norm, aspect="auto", origin="upper"
        )
        axis.set_title(name, loc="left")
        axis.set_xlabel(xlabel)
        axis.set_ylabel(ylabel)
        _whole_ticks(axis, E)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if yticks is not None:
            axis.set_yticks(range(E), yticks)
        if xticks is not None:
            axis.set_xticks(range(N), xticks, rotation=90 if max(map(len, xticks)) > 2 else 0)
        if E * N <= 100:
            _write_values(axis, values, norm)
    _colorbar(figure, image, axes, label)
    return figure


def spectra(layers: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Eigenvalues in descending order, of the first, some middle and the last logged step.

    Args:
        layers: steps [n] and eigenvalues [n,R] of each layer.
    """
    columns = 2 if len(layers) in (2, 4) else min(3, len(layers))
    figure, axes = _grid(-(-len(layers) // columns), columns, height=2.3)
    for axis, (name, (steps, values)) in zip(axes, layers.items(), strict=False):
        kept = _spread(range(len(steps)), 4)
        for shade, row in zip(np.linspace(0.85, 0.3, len(kept)), kept, strict=True):
            ordered = np.sort(values[row])[::-1]
            ordered = np.where(ordered > 0, ordered, np.nan)  # a logarithm shows none of these
            color = matplotlib.colormaps["viridis"](shade)
            axis.plot(np.arange(1, len(ordered) + 1), ordered, color=color, lw=1.3)
            axis.lines[-1].set_label(f"step {int(steps[row])}")
        axis.set_yscale("log")
        axis.set_title(name, loc="left")
        axis.set_xlabel("direction, by variance")
        axis.grid(True)
        axis.legend(fontsize=7, frameon=False)
    _hide_empty(axes)
    return figure


def positions(layers: Mapping[str, np.ndarray]) -> Figure:
    """Where each expert's patches lie: a row a layer, a column an expert, colour is the lift.

    Args:
        layers: [E,height,width] each.
    """
    shown = _spread(list(layers), ROWS)
    experts = _spread(range(next(iter(layers.values())).shape[0]), 16)
    figure, axes = _grid(len(shown), len(experts), height=WIDTH / max(len(experts), 6))
    norm = _norm([layers[name] for name in shown], 1.0)
    for axis, (name, k) in zip(axes, [(n, k) for n in shown for k in experts], strict=True):
        image = axis.imshow(layers[name][k], cmap=_BALANCE, norm=norm)
        _bare(axis)
        if k == experts[0]:
            axis.set_ylabel(name)
        if name == shown[0]:
            axis.set_title(f"{k}")
    _colorbar(figure, image, axes, "lift")
    return figure


def tinted(images: np.ndarray, layers: Mapping[str, np.ndarray], experts: int) -> Figure:
    """Images, and under them for each layer the same with every patch in its expert's colour.

    Args:
        images: [n,height,width,channels] in [0,1].
        layers: the best expert [n,h,w] of every patch.
        experts: E.
    """
    shown = _spread(list(layers), ROWS)
    count = len(images)
    figure, axes = _grid(len(shown) + 1, count, height=WIDTH / max(count, 6))
    palette = expert_colors(experts)
    pixels = images.repeat(3, axis=-1) if images.shape[-1] == 1 else images[..., :3]
    for row, name in enumerate(["image", *shown]):
        for column in range(count):
            axis = axes[row * count + column]
            picture = pixels[column]
            if row:
                patch = pixels.shape[1] // layers[name].shape[1]
                tint = palette[layers[name][column]].repeat(patch, axis=0).repeat(patch, axis=1)
                picture = 0.45 * picture + 0.55 * tint
            axis.imshow(picture, vmin=0.0, vmax=1.0)
            _bare(axis)
            if column == 0:
                axis.set_ylabel(name)
    scale = matplotlib.cm.ScalarMappable(Normalize(-0.5, experts - 0.5), ListedColormap(palette))
    bar = _colorbar(figure, scale, axes, "expert")
    bar.set_ticks(_spread(range(experts), 16))
    return figure


def _grid(rows: int, columns: int, *, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of rows of `height` inches; axes left to right, then down."""
    figure = Figure(figsize=(WIDTH, max(height * rows, 1.6) + 0.3), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


def _colorbar(figure: Figure, image: Any, axes: Sequence[Axes], label: str) -> Any:
    _hide_empty(axes)
    used = [axis for axis in axes if axis.has_data()]
    # An arrow where the scale ends below the largest value.
    extend = "max" if image.norm.vmax == LARGEST_LIFT else "neither"
    return figure.colorbar(image, ax=used, label=label, fraction=0.03, pad=0.02, extend=extend)


def _hide_empty(axes: Sequence[Axes]) -> None:
    """Hides the places of a grid that nothing was drawn in."""
    for axis in axes:
        axis.set_visible(axis.has_data())


def _norm(values: Sequence[np.ndarray], center: float) -> TwoSlopeNorm:
    """A scale whose middle is white: `center` 0 of cosines, or 1 of shares over the fair one.

    Shares go from 0 to at least 2 and at most `LARGEST_LIFT`.
    """
    finite = np.concatenate([v[np.isfinite(v)].ravel() for v in values])
    reach = float(np.max(np.abs(finite), initial=0.0))
    if center:
        return TwoSlopeNorm(center, 0.0, min(max(reach, 2.0), LARGEST_LIFT))
    return TwoSlopeNorm(0.0, -max(reach, 0.1), max(reach, 0.1))


def _write_values(axis: Axes, values: np.ndarray, norm: Normalize) -> None:
    """Numbers on the cells of a map; white on dark cells."""
    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            number = round(float(value), 2) + 0.0  # no minus before a zero
            dark = abs(float(norm(value)) - 0.5) > 0.3
            axis.text(
                column,
                row,
                f"{number:.2f}" if number < 10 else f"{number:.0f}",
                ha="center",
                va="center",
                fontsize=6.5,
                color="white" if dark else "black",
            )


def _edges(steps: np.ndarray) -> np.ndarray:
    """Borders [n+1] of cells for ascending steps [n], between the steps and half a step around."""
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[steps[0] - 0.5], middle, [steps[-1] + 0.5]])


def _widen(axis: Axes, log: bool) -> None:
    """Shows at least a factor of 10, or a thousandth of the values: less is rounding."""
    low, high = axis.get_ylim()
    if log:
        factor = max((10 * low / high) ** 0.5, 1.0) if low > 0 else 1.0
        axis.set_ylim(low / factor, high * factor)
        return
    more = max(LEAST_SPAN, 1e-3 * abs(high + low) / 2) - (high - low)
    if more > 0:
        axis.set_ylim(low - more / 2, high + more / 2)


def _steps(axis: Axes) -> None:
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _whole_ticks(axis: Axes, count: int) -> None:
    axis.set_yticks(_spread(range(count), 9))


def _bare(axis: Axes) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    picked = np.linspace(0, len(items) - 1, most).round().astype(int)
    return [items[i] for i in picked]
