"""Reports on a run: python -m train.report --workdir=DIR [--study=FILE.json ...] [--json=FILE].

Writes DIR/report/index.html, one page that needs nothing else, and its figures as PNG beside it:
balance over training, eigenvalue spectra, how the experts differ and which tokens they take.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from emoe_jax import json_file
from emoe_jax.config import LMConfig, ViTConfig, moe_layers, require
from emoe_jax.models.stack import layer_names
from train import cli, cluster, diversity, logs, report_experts, report_training, routes, tables
from train import report_page as page
from train.comparison import noise_floor
from train.config import digest
from train.data.config import TextConfig
from train.data.text import TextData
from train.evaluate import compile_evaluate, evaluate
from train.flops import image_tokens
from train.report_page import Section
from train.report_training import Album, Layers, Log
from train.routes import Routes
from train.run import CONFIG_FILE, Run, load_trained
from train.step import routers_of

Tree = Any
Rows = list[dict[str, Any]]

FOLDER = "report"
"""Folder of the page in the run's folder."""

NAMES = ("table", "metric")
"""Keys of a study's rows that name the table to which a row belongs."""

GLOSSARY = {
    "Expert, router": "A layer holds E small networks, the experts. A router sends each token (a"
    " piece of text or a patch of an image) to K of them.",
    "Load": "The share of all assignments (tokens times K) that an expert gets. Fair: 1/E.",
    "MaxVio": "E times the largest load, minus 1. 0: perfect balance; 1: the busiest expert has"
    " twice its share; E - 1: one expert takes everything.",
    "Dead expert": "One with less than a hundredth of its fair share.",
    "Entropy of the load": "1: all experts equally busy; 0: one does all.",
    "Gate": "The weight that a token gives to an expert's output.",
    "Lift": "The share of a category among an expert's tokens, over its share among all tokens.",
    "Explained": "Mutual information between expert and category, over the entropy of the experts:"
    " how much of the routing the category decides. With K above 1 it cannot reach 1.",
    "Similarity": "The mean cosine between the outputs of two experts for the same tokens.",
    "Spectrum": "The variances of the tokens along the directions of the router's basis.",
    "Energy captured": "The share of the tokens' variance that lies in the basis.",
    "Drift": "The distance between the spaces of two bases: 0 the same, 1 at right angles.",
    "Running window": "The mean of the last training batches, in which noise averages out.",
    "low, high": "In tables of studies: the ends of a 95 % interval.",
    "Whitening": "Scaling directions so that tokens vary as much along each.",
    "Held out": "Data on which the model was not trained.",
}


class Study(NamedTuple):
    """A table that a program wrote with --json.

    Attributes:
        name: of its file.
        rows: its objects.
        run: command, device, versions and commit.
    """

    name: str
    rows: Rows
    run: dict[str, Any]


class Logs(NamedTuple):
    """What training wrote.

    Attributes:
        scalars: of `logs.read_metrics`; empty where there is no such file.
        arrays: of `logs.read_routing`; empty where there is no such file.
    """

    scalars: Log
    arrays: Log


class Measured(NamedTuple):
    """What is measured for a report.

    Attributes:
        scalars: of the evaluation.
        rows: routing table of the evaluation.
        similarity: cosines [E,E] by layer; empty without experts.
        swap_cost: nats, see `diversity.swap_cost`; None without experts.
        found: routes; None where there are none.
        why: then the reason.
    """

    scalars: dict[str, float]
    rows: Rows
    similarity: dict[str, np.ndarray]
    swap_cost: float | None
    found: Routes | None
    why: str | None


def read_study(path: str) -> Study:
    """Reads what a program wrote with --json.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another kind of file.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"--study={path}: there is no such file")
    wanted = (
        'it must be an object with "rows", a list of objects, and "run", an object, as'
        " python -m train.compare --json=FILE writes"
    )
    try:
        tree = json_file.parse(file.read_bytes(), f"--study={path}")
    except ValueError as error:
        raise ValueError(f"{error}; {wanted}") from error
    is_study = (
        isinstance(tree, dict)
        and isinstance(tree.get("run"), dict)
        and isinstance(tree.get("rows"), list)
        and all(isinstance(row, dict) for row in tree["rows"])
    )
    require(is_study, f"--study={path} is no table of a study; {wanted}")
    return Study(file.name, tree["rows"], tree["run"])


def read_logs(workdir: pathlib.Path) -> Logs:
    """Reads the logs in a run's folder.

    Raises:
        ValueError: one of them is damaged.
    """
    has_scalars, has_arrays = ((workdir / n).is_file() for n in (logs.METRICS, logs.ROUTING))
    return Logs(
        logs.read_metrics(workdir) if has_scalars else [],
        logs.read_routing(workdir) if has_arrays else [],
    )


def measure(run: Run, state: Tree, *, batches: int) -> Measured:
    """Evaluates a model, and looks at its experts.

    Args:
        run: the run.
        state: holds `params` and `router`.
        batches: held-out batches from which routes and similarity are taken.
    """
    evaluator = compile_evaluate(run)
    scalars, rows = evaluate(run, evaluator, state)
    similarity, swap_cost, found = {}, None, None
    if rows:
        similarity = diversity.expert_similarity(run, state, batches=batches)
        swap_cost = diversity.swap_cost(run, evaluator, state, batches=batches)
    why = routes.no_routes(run)
    if why is None:
        found = routes.collect(run, state, batches=batches)
    return Measured(scalars, rows, similarity, swap_cost, found, why)


def write_report(
    workdir: pathlib.Path,
    run: Run,
    state: Tree,
    step: int,
    written: Logs,
    measured: Measured,
    studies: Sequence[Study],
) -> pathlib.Path:
    """Writes the page and its figures.

    Args:
        workdir: the run's folder; `FOLDER` in it exists.
        run: the run.
        state: holds `router`.
        step: of the checkpoint.
        written: of `read_logs`.
        measured: of `measure`.
        studies: tables to show besides.

    Returns:
        The page's file.
    """
    folder = workdir / FOLDER
    album, config = Album(folder), run.config.model
    log, arrays = written
    moe = config.moe
    sections = [
        report_training.learning(log, album),
        report_training.balance(
            log,
            arrays,
            measured.rows,
            album,
            floor=noise_floor(moe.experts, moe.top_k, _tokens(run)),
        ),
        report_training.bases(log, arrays, state_spectra(run, state, step), album, moe.router),
        report_experts.diversity(measured.similarity, measured.swap_cost, album),
        report_experts.specialisation(
            measured.found,
            measured.why,
            album,
            run.data.tokenizer if isinstance(run.data, TextData) else None,
        ),
        study_section(studies),
        Section("glossary", "Glossary", [page.definitions(GLOSSARY)]),
    ]
    file = folder / "index.html"
    title = f"{_task(run)}, router {moe.router}"
    text = page.page(title, lead(workdir, run, step, measured), sections)
    file.write_text(text, encoding="utf-8")
    return file


def lead(workdir: pathlib.Path, run: Run, step: int, measured: Measured) -> list[page.Block]:
    """The head of the page: what was trained, the result, and what made it."""
    facts = tables.run_facts()
    made = {
        "made by": facts["command"],
        "device": facts["device"],
        "versions": facts["versions"],
        "commit": facts["commit"],
        "configuration": f"{_config_digest(workdir)} ({workdir / CONFIG_FILE})",
    }
    rows = [{"": name, "value": page.cell(value)} for name, value in made.items()]
    scalars = {k: v for k, v in measured.scalars.items() if not k.startswith("eval/router/")}
    shown = [{"layer": row["layer"]} | _without(row, "layer", "load") for row in measured.rows]
    blocks = [
        page.paragraph(_what(run, step)),
        page.tiles(_key_facts(measured)),
        page.table([{"scalar": k, "value": v} for k, v in scalars.items()], "Held-out result"),
        page.table(rows),
    ]
    if shown:
        blocks.insert(3, page.table(shown, "Routing of each layer on held-out data"))
    return blocks


def study_section(studies: Sequence[Study]) -> Section:
    """Tables of studies as they are.

    One table for rows of the same `NAMES`, or of the same keys where a study has no names.
    """
    title = "Comparisons"
    if not studies:
        text = "No study was given: --study=FILE.json shows what python -m train.compare wrote."
        return Section("studies", title, [page.absent(text)])
    blocks = []
    for study in studies:
        blocks.append(page.heading(study.name))
        groups: dict[tuple[str, ...], Rows] = {}
        for row in study.rows:
            named = tuple(row[name] for name in NAMES if isinstance(row.get(name), str))
            groups.setdefault(named or tuple(row), []).append(row)
        for name, rows in groups.items():
            caption = ", ".join(name) if NAMES[0] in rows[0] else ""
            table = page.table([_without(row, *NAMES) for row in rows], caption)
            # Rows that hold more than plain values list single runs: long, and seldom read.
            nested = any(isinstance(v, dict) for row in rows for v in row.values())
            blocks.append(page.folded(caption or "rows", [table]) if nested else table)
        made = [{"": name, "value": page.cell(value)} for name, value in study.run.items()]
        blocks.append(page.folded("how it was measured", [page.table(made)]))
    return Section("studies", title, blocks)


def state_spectra(run: Run, state: Tree, step: int) -> Layers:
    """The spectra that routers keep in their state, as if logged at the checkpoint's step."""
    kept = routers_of(state["router"])
    found: Layers = {}
    for place, names in layer_names(run.config.model).items():
        if "spectrum" in kept.get(place, {}):
            for name, values in zip(names, np.asarray(kept[place]["spectrum"]), strict=True):
                found[name] = np.array([step]), values[None]
    return dict(sorted(found.items()))


def table_rows(step: int, measured: Measured) -> Rows:
    """What --json holds: the result, then one row a layer."""
    first: dict[str, Any] = {"layer": "all", "step": step} | measured.scalars
    if measured.swap_cost is not None:
        first["swap_cost"] = measured.swap_cost
    known = {} if measured.found is None else measured.found.counts
    told = {row["layer"]: row for row in routes.summary(known)}
    rows = []
    for name, matrix in measured.similarity.items():
        similarity = {"layer": name, "similarity": diversity.mean_similarity(matrix)}
        rows.append(similarity | told.get(name, {}))
    return [first, *rows]


def _key_facts(measured: Measured) -> dict[str, str]:
    """The numbers to read first."""
    scalars, facts = measured.scalars, {}
    for name, words, form in (
        ("eval/bits_per_byte", "bits per byte, held out", "{:.4f}"),
        ("eval/accuracy", "accuracy, held out", "{:.2%}"),
        ("eval/loss", "loss, nats, held out", "{:.4f}"),
    ):
        if name in scalars:
            facts[words] = form.format(scalars[name])
    if not measured.rows:
        return facts
    vios = [row["max_vio"] for row in measured.rows]
    facts["MaxVio, mean of layers"] = f"{np.mean(vios):.3f}"
    facts["MaxVio, worst layer"] = f"{max(vios):.3f}"
    experts = sum(len(row["load"]) for row in measured.rows)
    facts["dead experts, all layers"] = f"{sum(r['dead'] for r in measured.rows):.0f} of {experts}"
    if measured.swap_cost is not None:
        facts["loss added by swapping experts"] = f"{measured.swap_cost:+.4f}"
    return facts


def _what(run: Run, step: int) -> str:
    """One sentence on what was trained."""
    config, moe, data = run.config, run.config.model.moe, run.config.data
    layers = sum(moe_layers(config.model))
    source = ", ".join(data.sources) if isinstance(data, TextConfig) else data.source
    return (
        f"{_task(run)} of width {config.model.width} with {config.model.depth} blocks, {layers} of"
        f" them with {moe.experts} experts each, of which a token uses {moe.top_k}; trained on"
        f" {source}, seed {config.seed}, with {config.batch} rows a step; checkpoint of step {step}"
        f" of {config.steps}."
    )


def _task(run: Run) -> str:
    return "Language model" if isinstance(run.config.model, LMConfig) else "Vision Transformer"


def _tokens(run: Run) -> int:
    """Routed tokens of a training batch."""
    config = run.config.model
    if isinstance(config, ViTConfig):
        return run.config.batch * image_tokens(config)
    return run.units_per_step


def _config_digest(workdir: pathlib.Path) -> str:
    """The digest that training printed."""
    return digest(json_file.read_object(workdir / CONFIG_FILE))


def _without(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in names}


def _begin(workdir: pathlib.Path) -> Logs:
    """Reads the logs and makes the report's folder, before any time is spent."""
    written = read_logs(workdir)
    (workdir / FOLDER).mkdir(exist_ok=True)
    return written


def main(argv: list[str]) -> None:
    """Writes the report of a checkpoint."""
    args = flags.FLAGS
    workdir = pathlib.Path(args.workdir)
    require(args.batches >= 1, f"--batches={args.batches} must be at least 1")
    cluster.check_same({"batches": args.batches})
    # Only the first process shows what is read here; what it refuses ends all of them.
    studies = cluster.together(
        lambda: [read_study(path) for path in args.study] if cluster.is_first() else []
    )
    run, state, step = load_trained(workdir, cli.overrides(args.override), args.step)
    written = cluster.together(lambda: _begin(workdir) if cluster.is_first() else Logs([], []))
    measured = measure(run, state, batches=args.batches)
    if not cluster.is_first():
        return
    file = write_report(workdir, run, state, step, written, measured, studies)
    rows = table_rows(step, measured)
    tables.print_table("What explains the routes", rows[1:])
    print(f"report: {file}")
    if args.json:
        tables.write_json(args.json, rows)


if __name__ == "__main__":
    cli.define_trained_run()
    flags.DEFINE_multi_string(
        "study", [], "Table of a study to show besides, of train.compare --json; repeatable."
    )
    flags.DEFINE_integer("batches", 16, "Held-out batches whose tokens are followed.")
    flags.DEFINE_string("json", "", "File to write the table to.")
    cli.run(main)
