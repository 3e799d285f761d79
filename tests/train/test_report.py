"""The report: one page that needs nothing else and says what it has no data for."""

import dataclasses
import html.parser
import json
import math
import shutil
import sys
import types

import numpy as np
import pytest

from tests.train.tiny import vit_tree
from train import report, report_experts, report_figures, report_page, report_training, routes, run
from train.config import freeze
from train.data.tokenizer import byte_tokenizer
from train.report_figures import Panel
from train.routes import Routes

PNG = b"\x89PNG\r\n\x1a\n"
VOID = {"meta", "img", "source", "wbr"}


class Checker(html.parser.HTMLParser):
    """Text, tags and addresses of a page; an error where a tag is not closed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.addresses, self.text = [], [], [], ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "srcset", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def routing_lines(steps, layers):
    """Lines of routing.jsonl with loads that become fair, and spectra."""
    loads = {step: [0.25 + 0.6 / step, *[0.25 - 0.2 / step] * 3] for step in steps}
    return [
        json.dumps({"step": step} | {n: {"load": load, "spectrum": [4.0, 1.0]} for n in layers})
        for step, load in loads.items()
    ]


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    return report_training.Album(tmp_path_factory.mktemp("figures"))


def heldout_rows(E=4):
    load = [0.7, *[0.3 / (E - 1)] * (E - 1)]
    return [{"layer": "layer_00", "load": load, "max_vio": E * 0.7 - 1, "dead": 0.0}]


# ---------------------------------------------------------------------------------- the program


def test_the_program_writes_one_page_that_needs_nothing_else(
    finished, one_device, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(finished.workdir, workdir)
    names = ["layer_00", "layer_01"]
    text = "".join(line + "\n" for line in routing_lines(range(1, 25), names))
    (workdir / "routing.jsonl").write_text(text)
    evil = "<script>alert(1)</script>"
    rows = [
        {"router": evil, "loss": 2.5, "max_vio": 0.125},
        {"router": "eigen", "loss": math.nan, "max_vio": None},
        {"pair": "a & b", "difference": -0.5, "interval": [-0.75, -0.25]},
    ]
    study = tmp_path / "study.json"
    study.write_text(json.dumps({"rows": rows, "run": {"command": evil, "commit": None}}))

    flags = types.SimpleNamespace(
        workdir=str(workdir), override=[], step="newest", batches=2, study=[str(study)],
        json=str(tmp_path / "table.json"),
    )  # fmt: skip
    monkeypatch.setattr(report, "flags", types.SimpleNamespace(FLAGS=flags))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "train.report"])
    report.main([])

    page = Checker((workdir / "report" / "index.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert evil in page.text  # shown, not run
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    for word in (
        "Language model of width 16 with 2 blocks, 2 of them with 4 experts each",
        "checkpoint of step 24 of 24",
        f"{finished.scalars['eval/bits_per_byte']:.4f}",
        "-0.75, -0.25",
        "A held-out passage",
        "⟨begin⟩",
        "Dead expert",
    ):
        assert word in page.text
    for name in report.GLOSSARY:
        assert name in page.text
    drawn = {file.stem for file in (workdir / "report").glob("*.png")}
    assert drawn >= {"balance", "heldout_load", "learning", "load_over_training"}
    assert drawn >= {"basis", "similarity", "spectra", "token_kinds"}
    assert page.tags.count("figure") == len(drawn)
    assert "report: " in capsys.readouterr().out

    table = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [row["layer"] for row in table] == ["all", *names]
    assert table[0]["eval/loss"] == pytest.approx(finished.scalars["eval/loss"], rel=1e-6)
    assert math.isfinite(table[0]["swap_cost"])
    assert table[1]["by token"] > table[1]["by token, chance"]
    assert -1 <= table[2]["similarity"] <= 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", r"is no JSON \(.*train\.compare --json=FILE writes"),
        ("[]", r'is no table of a study; it must be an object with "rows"'),
        ('{"rows": [1], "run": {}}', "is no table of a study"),
        ('{"rows": []}', "is no table of a study"),
        ('{"rows": {}, "run": {}}', "is no table of a study"),
    ],
)
def test_a_study_of_another_form_is_refused(tmp_path, content, words):
    file = tmp_path / "study.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"--study=.*{words}"):
        report.read_study(str(file))


def test_input_is_refused_before_anything_is_measured(finished, one_device, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("measured")

    def start(**given):
        known = {"workdir": tmp_path, "override": [], "step": "newest", "study": [], "batches": 2}
        flags = types.SimpleNamespace(json="", **(known | given))
        monkeypatch.setattr(report, "flags", types.SimpleNamespace(FLAGS=flags))
        report.main([])

    monkeypatch.setattr(report, "measure", never)
    with pytest.raises(FileNotFoundError, match=r"--study=.*there is no such file"):
        start(study=[str(tmp_path / "none.json")])
    with pytest.raises(FileNotFoundError, match=r"holds no run: there is no config\.json; train"):
        start()
    with pytest.raises(ValueError, match="--batches=0 must be at least 1"):
        start(batches=0)
    (tmp_path / "config.json").write_text((finished.workdir / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match="no checkpoints at"):
        start()
    shutil.copytree(finished.workdir, tmp_path / "run")
    (tmp_path / "run" / "routing.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match=r"Line 1 of .*routing\.jsonl"):
        start(workdir=tmp_path / "run")


def test_a_folder_without_logs_reads_as_empty_logs(tmp_path):
    assert report.read_logs(tmp_path) == ([], [])


def test_spectra_are_found_in_the_state_of_routers():
    model = {"depth": 4, "moe_every": 2}
    this = run.Run(freeze(vit_tree(model=model)), *[None] * 6)
    kept = np.array([[3.0, 1.0], [5.0, 2.0]])  # blocks 1 and 3
    state = {"router": {"blocks": {"groups": {"1": {"moe": {"router": {"spectrum": kept}}}}}}}
    found = report.state_spectra(this, state, 7)
    assert {name: (s.tolist(), v.tolist()) for name, (s, v) in found.items()} == {
        "layer_01": ([7], [[3.0, 1.0]]),
        "layer_03": ([7], [[5.0, 2.0]]),
    }
    assert report.state_spectra(this, {"router": {}}, 7) == {}


# ---------------------------------------------------------------------------------- its sections


def test_a_study_has_a_table_for_each_of_its_tables():
    rows = [
        {"table": "task", "metric": "loss", "variant": "eigen", "mean": 2.0},
        {"table": "task", "metric": "loss", "variant": "switch", "mean": 1.0, "difference": -1.0},
        {"table": "balance", "metric": "max_vio", "variant": "eigen", "mean": 3.0},
        {"table": "runs", "variant": "eigen", "metrics": {"loss": 2.0}},
        {"variant": "x", "steps": 3},
    ]
    section = report.study_section([report.Study("s.json", rows, {"commit": "abc"})])
    page = Checker(report_page.page("t", [], [section]))
    assert page.tags.count("table") == 5  # and how it was measured
    assert page.tags.count("details") == 2  # single runs, and how it was measured
    for text in ("task, loss", "balance, max_vio", "switch", "loss 2", "abc"):
        assert text in page.text


def test_sections_without_data_say_so(album):
    def text(section):
        return Checker(report_page.page("t", [], [section])).text

    assert "metrics.jsonl holds no losses" in text(report_training.learning([], album))
    balance = report_training.balance([], [], heldout_rows(), album, floor=0.1)
    assert "metrics.jsonl holds no routing metrics" in text(balance)
    assert "routing.jsonl holds no loads" in text(balance)
    assert "busiest expert has 2.80 times its share" in text(balance)
    none = report_training.balance([], [], [], album, floor=0.1)
    assert "no expert layers" in text(none)
    bases = text(report_training.bases([], [], {}, album, "softmax"))
    assert "Spectra: the router softmax keeps none." in bases
    assert "Drift of the basis: the router softmax logged none." in bases
    assert "no expert layers" in text(report_experts.diversity({}, None, album))
    why = "The router soft sends every token to every expert."
    assert why in text(report_experts.specialisation(None, why, album, None))
    assert "No study was given" in text(report.study_section([]))


def test_bases_show_drift_and_the_state_s_spectra(album):
    log = [
        {"step": s, "router/layer_00/drift": 1 / s, "router/layer_00/condition": 10.0 * s}
        for s in (1, 2, 3)
    ]
    now = {"layer_00": (np.array([3]), np.array([[1.0, 0.0, 4.0]]))}
    section = report_training.bases(log, [], now, album, "whitened")
    page = Checker(report_page.page("t", [], [section]))
    assert page.tags.count("figure") == 2
    assert "keeps none" not in page.text
    assert "logged none" not in page.text


def test_logs_are_read_by_layer():
    log = [
        {"step": 1, "train/loss": 3.0, "router/layer_00/max_vio": 2.0},
        {"step": 2, "router/layer_00/max_vio": 1.0, "router/layer_01/max_vio": 0.5},
    ]
    assert report_training.line(log, "train/loss") == ([1], [3.0])
    assert report_training.line(log, "eval/loss") is None
    assert report_training.router_lines(log) == {
        "max_vio": {"layer_00": ([1, 2], [2.0, 1.0]), "layer_01": ([2], [0.5])}
    }
    arrays = [
        {"step": 1, "layer_00": {"load": np.ones(2)}},
        {"step": 2, "layer_00": {"load": np.ones(3)}, "layer_01": {"spectrum": np.ones(2)}},
        {"step": 3, "layer_00": {"load": np.zeros(3)}},
    ]
    steps, loads = report_training.array_layers(arrays, "load")["layer_00"]
    assert steps.tolist() == [2, 3]  # the number of experts is that of the last line
    assert loads.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert list(report_training.array_layers(arrays, "spectrum")) == ["layer_01"]


def test_what_never_happens_is_no_figure():
    lines = {
        "offset": {"layer_00": ([1, 2], [0.5, 0.25])},
        "drop_fraction": {"layer_00": ([1, 2], [0.0, 0.0])},
        "overflow_fraction": {"layer_00": ([1, 2], [0.0, 0.1])},
        "max_vio": {"layer_00": ([1], [1.0])},
        "cv": {"layer_00": ([1], [1.0])},
    }
    titles = [panel.title for panel in report_training._other_panels(lines)]
    assert titles == ["largest offset", "overflowed exchanges"]


def test_alarms_are_counted(album):
    log = [{"step": step, "alarm/max_vio_window": float(step == 2)} for step in (1, 2, 3)]
    text = Checker(report_training._alarms(log)).text
    assert text.endswith("MaxVio of the running window312")  # three steps, one alarm, at step 2
    assert "holds no alarms" in report_training._alarms([])


def test_images_are_tinted_and_experts_tabled(album):
    draw = np.random.default_rng(0)
    counts = {"class": draw.integers(1, 9, (3, 10)), "position": draw.integers(1, 9, (3, 5))}
    counts["class"][2] = counts["position"][2] = 0  # a dead expert
    found = Routes(
        counts={"layer_01": counts},
        tokens=123,
        examples={"images": draw.random((2, 8, 8, 3)), "labels": np.array([1, 2])},
        chosen={"layer_01": draw.integers(0, 3, (6, 5))},  # four rows are padding
        patches=4,
    )
    section = report_experts.specialisation(found, None, album, None)
    page = Checker(report_page.page("t", [], [section]))
    assert page.tags.count("figure") == 3  # classes, positions, tinted images
    assert "From 123 tokens" in page.text
    many = dict(counts, **{"class": draw.integers(1, 9, (3, 50))})
    section = report_experts.specialisation(
        dataclasses.replace(found, counts={"layer_01": many}), None, album, None
    )
    page = Checker(report_page.page("t", [], [section]))
    assert page.tags.count("figure") == 2  # fifty columns of classes are a table only


def test_the_table_of_experts_lists_by_count_and_by_lift():
    counts = np.array([[60, 30, 10, 0], [50, 0, 0, 50]])
    text = Checker(report_experts.expert_table("layer_00", counts, ["a", "<b>", "c", "d"])).text
    assert "a 60%   <b> 30%   c 10%" in text
    # Shares over all 200: a .55, b .15, c .05, d .25.
    assert "<b> 2.0   c 2.0   a 1.1" in text
    assert "d 2.0   a 0.9" in text


def test_a_passage_has_a_colour_for_each_expert_and_none_for_what_is_not_scored(album):
    ids = np.array([list(b"<union>")])
    counts = {"token": routes.count(np.zeros((7, 1), int), ids[0], experts=2, categories=258)}
    tokenizer = byte_tokenizer()
    counts["kind"] = routes.merged(counts["token"], routes.token_kinds(tokenizer), 7)
    found = Routes(
        counts={"layer_00": counts},
        tokens=7,
        examples={"tokens": ids},
        chosen={"layer_00": np.array([[-1, 0, 1, 0, 1, 0, -1]])},
    )
    blocks = report_experts._passages(found, [chr(i) for i in range(258)])
    assert blocks[-1].count("rgba(") == 5
    assert blocks[-1].count('title="unscored"') == 2
    assert "&lt;" in blocks[-1]
    assert len(blocks) == 2  # one layer


# ---------------------------------------------------------------------------------- page, figures


def test_text_from_data_is_escaped_everywhere():
    evil = '<img src=x onerror="a">&'
    blocks = [
        report_page.paragraph(evil),
        report_page.heading(evil),
        report_page.absent(evil),
        report_page.tiles({evil: evil}),
        report_page.table([{evil: evil}], evil),
        report_page.figure(PNG, PNG, evil, evil),
        report_page.tinted_text([(evil, evil, evil)]),
        report_page.folded(evil, []),
        report_page.definitions({evil: evil}),
    ]
    page = Checker(report_page.page(evil, blocks, [report_page.Section("a", evil, [])]))
    assert page.tags.count("img") == 1  # the figure's
    assert page.text.count(evil) == 17


def test_cells_are_short_and_tables_have_a_column_a_key():
    cells = [None, True, 0.123456, math.nan, 3, [0.5, 1], {"a": 1.0}, "x"]
    shown = [report_page.cell(value) for value in cells]
    assert shown == ["", "yes", "0.1235", "nan", "3", "0.5, 1", "a 1", "x"]
    table = report_page.table([{"a": 1.5, "b": "x"}, {"a": None, "c": 2}])
    assert table.count("<th") == 3
    assert table.count("<td") == 6
    assert table.count('class="number"') == 2 * 3


def test_figures_come_in_two_themes_and_in_every_size():
    steps = np.arange(1, 4)
    loads = np.full((3, 4), 0.25)
    draws = [
        lambda: report_figures.curves([Panel("x", {"a": ([1], [math.nan])}, 0.5)]),
        lambda: report_figures.curves(
            [Panel("x", {f"{i}": ([1, 2], [1.0, 2.0]) for i in range(12)}, log=True)] * 3
        ),
        lambda: report_figures.loads_over_time({"a": (steps[:1], loads[:1])}),
        lambda: report_figures.loads_over_time(dict.fromkeys("abc", (steps, loads))),
        lambda: report_figures.maps(
            {"a": np.full((1, 1), np.nan)}, label="x", xlabel="y", center=0.0
        ),
        lambda: report_figures.maps({n: np.eye(40) for n in "abc"}, label="x", xlabel="y"),
        lambda: report_figures.spectra({n: (steps, np.ones((3, 2))) for n in "abcd"}),
        lambda: report_figures.positions({"a": np.full((2, 2, 2), np.nan)}),
        lambda: report_figures.tinted(
            np.ones((1, 4, 4, 1)), {str(n): np.zeros((1, 2, 2), int) for n in range(9)}, 20
        ),
    ]
    for draw in draws:
        assert report_figures.render(draw, "light").startswith(PNG)
    light, dark = (report_figures.render(draws[0], theme) for theme in ("light", "dark"))
    assert dark.startswith(PNG)
    assert light != dark
    assert len({tuple(c) for c in report_figures.expert_colors(64)}) == 64
