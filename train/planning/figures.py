"""Figures of plans, as PNG."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Row = Mapping[str, Any]


def plan(
    file: pathlib.Path, title: str, memory: Sequence[Row], time: Sequence[Row], limit: float
) -> None:
    """Memory of a device against what is there, and where the projected step's time goes.

    Args:
        file: PNG to write.
        title: above both.
        memory: rows of `report.memory_rows`, the last of which is the sum.
        time: rows of `report.time_rows`.
        limit: bytes of a device.
    """
    figure, (left, right) = _figure(11.0, 4.0, 2)
    column = "compiled_GB" if "compiled_GB" in memory[0] else "formula_GB"
    bottom = 0.0
    for row in memory[:-1]:
        size = max(row[column], 0.0)
        left.bar(0, size, bottom=bottom, label=f"{row['part']} {size:.2f}")
        bottom += size
    left.axhline(limit / 1e9, color="black", linestyle="--", label=f"there: {limit / 1e9:.0f}")
    left.set_xlim(-0.6, 1.8)
    left.set_xticks([])
    left.set_ylabel(f"GB a device ({column.removesuffix('_GB')})")
    left.legend(fontsize="x-small", loc="center right")
    names = [row["part"] for row in time]
    right.barh(names[::-1], [row["projected_seconds"] for row in time][::-1])
    right.set_xlabel("projected seconds a step, at the chip's peak")
    figure.suptitle(title)
    _save(figure, file)


def curve(file: pathlib.Path, title: str, lines: Mapping[str, Sequence[Row]]) -> None:
    """Step time, MFU and share of the exchange against the number of devices.

    Args:
        file: PNG to write.
        title: above all.
        lines: by name, rows with `devices`, `seconds`, `mfu` and `exchange_share`, all projected.
    """
    figure, panels = _figure(13.0, 4.2, 3)
    labels = {
        "seconds": "projected seconds a step",
        "mfu": "projected MFU",
        "exchange_share": "exchange, share of the projected step",
    }
    for axes, (column, label) in zip(panels, labels.items(), strict=True):
        for name, rows in lines.items():
            style = "--" if name.startswith("strong") else "-"
            axes.plot(
                [row["devices"] for row in rows],
                [row[column] for row in rows],
                style,
                marker="o",
                markersize=3,
                label=name,
            )
        axes.set_xscale("log", base=2)
        axes.set_xlabel("devices")
        axes.set_ylabel(label)
    panels[0].set_yscale("log")
    panels[0].legend(fontsize="x-small")
    figure.suptitle(title)
    _save(figure, file)


def _figure(width: float, height: float, columns: int) -> tuple[Figure, list[Any]]:
    """A figure of the Agg backend, which needs no display, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, columns, squeeze=False).ravel())
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure, panels


def _save(figure: Figure, file: pathlib.Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
