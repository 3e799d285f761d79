"""Figures of a comparison, as PNG."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from train.comparison import Interval

MARKERS = "osD^vP*Xh<>"


def loss_against_balance(
    file: pathlib.Path, points: Mapping[str, tuple[Interval, Interval]]
) -> None:
    """Held-out loss of each variant against its MaxVio, with intervals: low and left is good.

    Args:
        file: PNG to write.
        points: MaxVio and loss by variant.
    """
    figure, (axes,) = _figure(7.0, 5.0)
    for number, (name, (vio, loss)) in enumerate(points.items()):
        axes.errorbar(
            vio.mean,
            loss.mean,
            xerr=_arms(vio),
            yerr=_arms(loss),
            marker=MARKERS[number % len(MARKERS)],
            linestyle="none",
            capsize=3,
            label=name,
        )
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set_xlim(left=-0.001)  # room for the mark of a variant at zero
    axes.set_xlabel("MaxVio over the held-out data, mean of layers (largest load / mean load - 1)")
    axes.set_ylabel("held-out loss (nats)")
    axes.set_title("Loss against balance: mean over seeds, 95 % t-interval")
    axes.legend(fontsize="small")
    _save(figure, file)


def balance_over_training(
    file: pathlib.Path, curves: Mapping[str, Sequence[Mapping[float, float]]], floor: float
) -> None:
    """MaxVio of single batches over training: mean over seeds, and the band from least to most.

    Args:
        file: PNG to write.
        curves: by variant, for each seed MaxVio by step.
        floor: what chance alone would give.
    """
    figure, (axes,) = _figure(8.0, 5.0)
    for name, seeds in curves.items():
        steps = sorted(set.intersection(*(set(seed) for seed in seeds)))
        if not steps:
            continue
        values = np.array([[seed[step] for seed in seeds] for step in steps])
        # A logarithm shows no zero; expert choice has nothing else.
        values[values <= 0] = np.nan
        (line,) = axes.plot(steps, values.mean(axis=1), label=name)
        axes.fill_between(
            steps, values.min(axis=1), values.max(axis=1), color=line.get_color(), alpha=0.2, lw=0
        )
    axes.axhline(floor, color="black", linestyle="--", linewidth=1, label="chance alone")
    axes.set_yscale("log")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("MaxVio of a batch, mean of layers")
    axes.set_title("Balance of single batches: mean over seeds, band from least to most")
    axes.legend(fontsize="small")
    _save(figure, file)


def load_per_expert(
    file: pathlib.Path, loads: Mapping[str, Mapping[str, Sequence[float]]], seed: int
) -> None:
    """Loads of all experts over the held-out data, one panel a variant and one line a layer.

    Args:
        file: PNG to write.
        loads: shares of the assignments by variant and layer.
        seed: whose runs they are of.
    """
    columns = min(4, len(loads))
    rows = -(-len(loads) // columns)
    figure, panels = _figure(3.2 * columns, 2.6 * rows, rows, columns)
    most = 1.0
    for axes, (name, layers) in zip(panels, loads.items(), strict=False):
        for layer, shares in layers.items():
            relative = np.sort(np.asarray(shares))[::-1] * len(shares)
            most = max(most, float(relative.max()))
            axes.plot(np.arange(1, len(shares) + 1), relative, marker=".", lw=1, label=layer)
        axes.axhline(1.0, color="black", linestyle="--", linewidth=1)
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("expert, by load")
        axes.set_ylabel("load / mean load")
    for axes in panels[: len(loads)]:
        axes.set_ylim(0, 1.05 * most)
    for axes in panels[len(loads) :]:
        axes.set_axis_off()
    panels[0].legend(fontsize="x-small")
    figure.suptitle(f"Load of each expert over the held-out data, seed {seed}")
    _save(figure, file)


def _figure(
    width: float, height: float, rows: int = 1, columns: int = 1
) -> tuple[Figure, list[Any]]:
    """A figure of the Agg backend, which needs no display, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.ravel():
        axes.grid(alpha=0.3)
    return figure, list(panels.ravel())


def _arms(interval: Interval) -> list[list[float]] | None:
    """Distances to both ends, None where there is no interval."""
    if np.isnan(interval.low) or np.isnan(interval.high):
        return None
    return [[interval.mean - interval.low], [interval.high - interval.mean]]


def _save(figure: Figure, file: pathlib.Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
