"""The parts of a report that come from a run's logs: learning, balance, bases."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from train import report_figures as figures
from train import report_page as page
from train.report_figures import Line, Panel
from train.report_page import Block, Section

Log = Sequence[Mapping[str, Any]]
Layers = dict[str, tuple[np.ndarray, np.ndarray]]

TITLES = {
    "max_vio": "MaxVio of a batch",
    "max_vio_window": "MaxVio of the running window",
    "dead": "dead experts",
    "dead_window": "dead experts of the running window",
    "entropy": "entropy of the load",
    "gate": "largest gate of a token",
    "drop_fraction": "dropped assignments",
    "drop_at_capacity": "assignments that a fixed buffer would drop",
    "overflow_fraction": "overflowed exchanges",
    "left_out": "tokens that the router's statistics leave out",
    "energy": "energy captured by the basis",
    "drift": "drift of the basis since the last checkpoint",
    "orthonormality_error": "orthonormality error",
    "condition": "condition number before whitening",
    "offset": "largest offset",
    "temperature": "temperature",
    "loss_spike": "steps whose loss is a spike",
}
"""Words for what routers log."""

BALANCE = ("max_vio", "max_vio_window", "dead", "dead_window", "entropy", "gate")
BASIS = ("energy", "drift", "orthonormality_error", "condition")
UNSEEN = ("cv",)
"""Logged, and left out here: another measure of what MaxVio shows."""

QUIET = ("dead_window", "drop_fraction", "drop_at_capacity", "overflow_fraction", "left_out")
"""Shown only where it happens at all."""


class Album:
    """Draws figures: PNG files in a folder, and blocks of the page.

    Args:
        folder: where the files go; it exists.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder

    def add(self, name: str, draw: figures.Drawing, caption: str) -> Block:
        """A figure on the page; NAME.png, in light colours, lies beside it."""
        light, dark = (figures.render(draw, theme) for theme in ("light", "dark"))
        (self._folder / f"{name}.png").write_bytes(light)
        return page.figure(light, dark, caption, name.replace("_", " "))


def line(log: Log, name: str) -> Line | None:
    """Steps and values of a scalar; None where it was never logged."""
    rows = [(row["step"], row[name]) for row in log if name in row]
    return ([step for step, _ in rows], [value for _, value in rows]) if rows else None


def router_lines(log: Log) -> dict[str, dict[str, Line]]:
    """What routers logged, by metric and layer: scalars named router/LAYER/METRIC."""
    names = sorted({name for row in log for name in row if name.startswith("router/")})
    found: dict[str, dict[str, Line]] = {}
    for name in names:
        _, layer, metric = name.split("/", 2)
        read = line(log, name)
        assert read is not None
        found.setdefault(metric, {})[layer] = read
    return found


def array_layers(routing: Log, name: str) -> Layers:
    """Steps [n] and values [n,E] of an array, by layer, where it was logged.

    Lines of another length than the last are left out.
    """
    layers = sorted({layer for row in routing for layer in row if layer != "step"})
    found = {}
    for layer in layers:
        rows = [(row["step"], row[layer][name]) for row in routing if name in row.get(layer, {})]
        rows = [(step, values) for step, values in rows if len(values) == len(rows[-1][1])]
        if rows and len(rows[-1][1]):
            found[layer] = np.array([s for s, _ in rows]), np.stack([v for _, v in rows])
    return found


def learning(log: Log, album: Album) -> Section:
    """Loss, and accuracy where there is one, over training."""
    panels = []
    for title, names in (
        ("loss, nats", {"training": "train/loss", "held out": "eval/loss"}),
        ("accuracy", {"training": "train/accuracy", "held out": "eval/accuracy"}),
        ("held-out bits per byte", {"held out": "eval/bits_per_byte"}),
    ):
        lines = {label: read for label, name in names.items() if (read := line(log, name))}
        if lines:
            panels.append(Panel(title, lines))
    if not panels:
        return Section("learning", "Learning", [page.absent(_no_log("losses"))])
    caption = (
        "The task's loss, without any auxiliary loss, and what is measured on held-out data. Good:"
        " both go down together; held-out loss that rises while training loss falls is overfitting."
    )
    return Section(
        "learning", "Learning", [album.add("learning", partial(figures.curves, panels), caption)]
    )


def balance(
    log: Log,
    routing: Log,
    heldout: Sequence[Mapping[str, Any]],
    album: Album,
    *,
    floor: float,
) -> Section:
    """Load, MaxVio, dead experts, entropy and gates.

    Args:
        log: of `logs.read_metrics`.
        routing: of `logs.read_routing`; empty where there is none.
        heldout: the routing table of the evaluation.
        album: draws.
        floor: MaxVio of a fair random assignment of a training batch, see `comparison.noise_floor`.
    """
    if not heldout:
        return Section("balance", "Balance", [page.absent("This model has no expert layers.")])
    blocks = [_heldout_loads(heldout, album), *_balance_curves(log, album, floor)]
    blocks += [_alarms(log), page.heading("Load of each expert over training")]
    loads = array_layers(routing, "load")
    if loads:
        caption = (
            "One map a layer: time runs to the right, a row is an expert, white is its fair share,"
            " red more and blue less. Good: pale everywhere soon after the start; a row that stays"
            " deep blue is an expert that learns nothing."
        )
        blocks.append(
            album.add("load_over_training", partial(figures.loads_over_time, loads), caption)
        )
    else:
        blocks.append(page.absent(_no_log("loads", "routing.jsonl")))
    others = _other_panels(router_lines(log))
    if others:
        blocks.append(page.heading("What else the router reported"))
        caption = (
            "Scalars of the router over training, a line a layer. Good: they settle; one that still"
            " moves fast at the end says that routes are still changing."
        )
        blocks.append(album.add("router_scalars", partial(figures.curves, others), caption))
    return Section("balance", "Balance", blocks)


def _heldout_loads(heldout: Sequence[Mapping[str, Any]], album: Album) -> Block:
    loads = np.array([row["load"] for row in heldout])
    shares = loads * loads.shape[1]
    draw = partial(
        figures.maps,
        {"all held-out tokens": shares},
        label="load over fair share",
        xlabel="expert",
        ylabel="",
        yticks=[str(row["layer"]) for row in heldout],
    )
    worst = max(heldout, key=lambda row: float(row["max_vio"]))
    caption = (
        "Load of every expert on all held-out data, over its fair share 1/E: 1 is fair. The"
        f" worst layer is {worst['layer']}, where the busiest expert has"
        f" {float(worst['max_vio']) + 1:.2f} times its share. Good: all near 1."
    )
    return album.add("heldout_load", draw, caption)


def _balance_curves(log: Log, album: Album, floor: float) -> list[Block]:
    lines = router_lines(log)
    panels = [
        Panel(TITLES[key], lines[key], floor if key == "max_vio" else None)
        for key in BALANCE
        if key in lines and not _silent(key, lines[key])
    ]
    if not panels:
        return [page.absent(_no_log("routing metrics"))]
    caption = (
        "A line a layer. MaxVio 0 is perfect balance; the dashed line"
        f" ({floor:.3g}) is what drawing experts at random would show in a batch of this size, so"
        " do not expect less. Good: MaxVio near that line, no dead experts, entropy near 1. The"
        " largest gate is how much weight a token gives its first expert."
    )
    return [album.add("balance", partial(figures.curves, panels), caption)]


def _other_panels(lines: Mapping[str, dict[str, Line]]) -> list[Panel]:
    shown = {
        key: layers
        for key, layers in lines.items()
        if key not in (*BALANCE, *BASIS, *UNSEEN) and not _silent(key, layers)
    }
    return [Panel(TITLES.get(key, key), layers) for key, layers in shown.items()]


def _silent(key: str, layers: Mapping[str, Line]) -> bool:
    """Whether it is of no news."""
    return key in QUIET and all(max(values) == 0 for _, values in layers.values())


def _alarms(log: Log) -> Block:
    """How often each threshold of the configuration was crossed."""
    names = sorted({name for row in log for name in row if name.startswith("alarm/")})
    rows = []
    for name in names:
        steps, layers = line(log, name) or ([], [])
        over = [step for step, count in zip(steps, layers, strict=True) if count > 0]
        key = name.removeprefix("alarm/")
        rows.append(
            {
                "alarm": TITLES.get(key, key),
                "logged steps": len(steps),
                "of them with an alarm": len(over),
                "last alarm at step": over[-1] if over else None,
            }
        )
    title = "Thresholds that layers crossed. Good: none, but for the first steps"
    return page.table(rows, title) if rows else page.absent(_no_log("alarms"))


def bases(log: Log, routing: Log, now: Layers, album: Album, router: str) -> Section:
    """Eigenvalue spectra and the movement of the basis.

    Args:
        log: of `logs.read_metrics`.
        routing: of `logs.read_routing`; empty where there is none.
        now: spectra in the checkpoint's router state, for runs that logged none.
        album: draws.
        router: its name.
    """
    lines = router_lines(log)
    spectra = array_layers(routing, "spectrum") or now
    panels = [
        Panel(TITLES[key], lines[key], log=key == "condition" and _positive(lines[key]))
        for key in BASIS
        if key in lines
    ]
    blocks = []
    if spectra:
        caption = (
            "Variance of the tokens in each direction of the basis, before whitening, largest"
            " first; on a logarithmic scale. Good: a smooth descent. A cliff means that the tokens"
            " fill fewer directions than the basis has, and whitening then amplifies noise."
        )
        blocks.append(album.add("spectra", partial(figures.spectra, spectra), caption))
    else:
        blocks.append(page.absent(f"Spectra: the router {router} keeps none."))
    if panels:
        caption = (
            "How much of the tokens' variance the basis holds, and how it changes, a line a layer."
            " Good: energy high or rising; drift that falls towards 0, as the basis settles (it is"
            " counted from the last checkpoint, so it starts anew there); orthonormality error"
            " below 1e-4. A basis of as many directions as the tokens have spans their whole space:"
            " its energy is 1 and it does not drift."
        )
        blocks.append(album.add("basis", partial(figures.curves, panels), caption))
    if "drift" not in lines:
        blocks.append(page.absent(f"Drift of the basis: the router {router} logged none."))
    return Section("basis", "Eigenbasis", blocks)


def _positive(layers: Mapping[str, Line]) -> bool:
    """Whether a logarithm can show every line."""
    return all(any(value > 0 for value in values) for _, values in layers.values())


def _no_log(what: str, file: str = "metrics.jsonl") -> str:
    return (
        f"No data: this run's {file} holds no {what}. Runs of an older version wrote none; what is"
        " trained from now on has them."
    )
