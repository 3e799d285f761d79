"""The study of docs/routing.md: the commands that it gives, and what is made of its files."""

import json
import os
import pathlib
import shlex
import stat
import subprocess
import sys

import pytest
from scipy.stats import ttest_1samp

from docs.studies.summary import (
    bars,
    between,
    holm,
    lines,
    main,
    overview,
    p_value,
    read,
    verdict,
)
from tests.train.test_outcome import ROW
from tests.train.tiny import lm_tree
from train.config import to_json
from train.variants import choose, read_options, variant_tree

ROOT = pathlib.Path(__file__).parents[2]
STUDY = ROOT / "docs/studies"

STAND_IN = """#!/usr/bin/env bash
printf '%q ' "$@" >> "$TOLD"
echo >> "$TOLD"
for word in "$@"; do
  case $word in
    --workdir=*) folder=${word#--workdir=} ;;
    --json=*) echo '{}' > "${word#--json=}" ;;
  esac
done
mkdir -p "$folder" && echo '{}' > "$folder/tuned.json"
"""


def commands(folder: pathlib.Path, *cells: str, **environment: str) -> list[list[str]]:
    """What the script would run, in order."""
    python = folder / "bin/python"
    python.parent.mkdir(exist_ok=True)
    python.write_text(STAND_IN)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    told = folder / "told"
    told.write_text("")
    given = {"PATH": f"{python.parent}:{os.environ['PATH']}", "TOLD": str(told)} | environment
    subprocess.run([STUDY / "study.sh", folder, *cells], env=os.environ | given, check=True)
    return [shlex.split(line) for line in told.read_text().splitlines()]


def flag(words: list[str], name: str) -> str:
    (value,) = [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]
    return value


def test_every_cell_is_tuned_once_a_task_and_compared(tmp_path):
    told = commands(tmp_path)
    assert all(words[:2] == ["-m", "train.compare"] for words in told)
    tuned = [flag(words, "workdir") for words in told if "--tune" in words]
    assert tuned == [f"{tmp_path}/runs/{t}" for t in ("fashion", "sotu", "bytes", "shakespeare")]
    compared = [words for words in told if "--tune" not in words]
    assert len(compared) == 8
    known = read_options([str(STUDY / "controls.json")])
    for words in told:
        # absl reads the configuration before it can change a key of it.
        config = next(i for i, word in enumerate(words) if word.startswith("--config="))
        keys = [i for i, word in enumerate(words) if word.startswith("--config.")]
        assert keys[0] > config
        choose(flag(words, "routers").split(","), known)


def test_a_study_goes_on_from_its_files(tmp_path):
    first = commands(tmp_path, "fashion_e32", STAGE="routers", SEEDS="2")
    assert len(first) == 2
    (second,) = commands(tmp_path, "fashion_e32", STAGE="controls")
    assert (flag(first[1], "seeds"), flag(second, "seeds")) == ("2", "5")
    assert flag(second, "results") == f"{tmp_path}/fashion_e32.json"
    (whole,) = commands(tmp_path, "fashion_e32")
    names = [set(flag(words, "routers").split(",")) for words in (first[1], second, whole)]
    assert names[0] < names[1] < names[2]
    (eight,) = commands(tmp_path, "fashion_e8")
    assert f"{tmp_path}/fashion_tuned.json" in flag(eight, "options")


@pytest.mark.parametrize(("cell", "experts"), [("fashion_e8", 8), ("fashion_e32", 32)])
def test_ranks_of_controls_are_in_numbers_of_experts(tmp_path, cell, experts):
    words = commands(tmp_path, cell)[-1]
    files = [name for name in flag(words, "options").split(",") if name.startswith("docs/")]
    known = read_options([str(ROOT / name) for name in files])
    for variant in choose(["fixed_rank_E", "rank_E", "rank_2E"], known):
        factor = 2 if variant.name == "rank_2E" else 1
        assert variant.options["moe.basis.rank"] == factor * experts


@pytest.mark.parametrize("cell", ["fashion", "digits_e8", "sotu_e16"])
def test_a_cell_that_is_none_is_refused(tmp_path, cell):
    with pytest.raises(subprocess.CalledProcessError):
        commands(tmp_path, "fashion_e8", cell)
    assert not (tmp_path / "told").read_text()


def test_a_command_of_it_is_one_that_the_program_takes(tmp_path):
    words = commands(tmp_path, "fashion_e32", SEEDS="1")[1]
    # With one seed the program stops once it has read all flags.
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert "error: --seeds=1 leaves no interval" in done.stderr


def results(folder: pathlib.Path, losses: dict[str, list[float]], **metrics: float) -> str:
    """A file of results: `losses` by variant and seed, the other metrics the same for all."""
    rest = dict.fromkeys(("max_vio", "max_vio_worst", "batch_max_vio", "dead"), 0.0)
    rest |= dict.fromkeys(("similarity", "swap_cost", "batch_max_vio_floor"), 0.0)
    rest |= dict.fromkeys(("drop_at_capacity", "batch_drop_at_capacity"), 0.0) | metrics
    rows = []
    for name, values in losses.items():
        (variant,) = choose([name], {})
        for seed, loss in enumerate(values):
            tree = json.loads(to_json(variant_tree(lm_tree(), variant, seed)))
            row = {"variant": name, "router": name, "seed": seed, "config": tree}
            ours = {"swap_cost": 1.0, "similarity": -1.0} if name == "whitened" else {}
            rows.append(ROW | row | {"metrics": rest | ours | {"loss": loss}})
    file = folder / "cell.json"
    file.write_text(json.dumps({"rows": rows, "run": {}}))
    return str(file)


def test_the_bars_are_those_of_the_page(tmp_path):
    losses = {
        "whitened": [1.0, 1.1],
        "switch": [1.3, 1.4],
        "loss_free": [1.1, 1.2],
        "softmax_offset": [0.9, 1.2],
    }
    table = read(results(tmp_path, losses))
    told = [verdict(bar) for bar in bars(table)]
    assert all("MISSED" not in line for line in told)
    # The control's -0.1 and 0.1 make no difference; -0.1 in both seeds, of 1.15.
    assert told[0] == "- loss less that of softmax_offset: +0.00 [-121.01, +121.01] %"
    best = "-8.70 [-8.70, -8.70] %, loss_free: met"
    assert told[4] == f"- loss less the best rival's (upper end 1 %): {best}"
    row = next(line for line in lines(table) if line.startswith("| `switch`"))
    assert row.startswith("| `switch` | 2 | 1.3500 | +0.3000 [+0.3000, +0.3000] |")


def test_one_pair_has_no_interval(tmp_path):
    table = read(results(tmp_path, {"whitened": [1.0, 1.1], "switch": [1.3]}))
    row = next(line for line in lines(table) if line.startswith("| `switch`"))
    assert row.startswith("| `switch` | 1 | 1.3000 |  | 0.000")


@pytest.mark.parametrize(
    ("metrics", "line"),
    [({"max_vio": 0.051}, 0), ({"max_vio_worst": 0.16}, 0), ({"dead": 1.0}, 1)]
    + [({"drop_at_capacity": 0.002}, 6), ({"batch_drop_at_capacity": 0.002}, 6)],
)
def test_a_bar_that_is_missed_says_so(tmp_path, metrics, line):
    found = bars(read(results(tmp_path, {"whitened": [1, 2], "loss_free": [1, 2]}, **metrics)))
    assert [number for number, bar in enumerate(found) if not bar.met] == [line]
    assert verdict(found[line]).endswith(": MISSED")


def test_a_loss_that_might_be_worse_misses_its_bar(tmp_path):
    losses = {"whitened": [1.0, 1.3], "loss_free": [1.1, 1.2]}
    assert not bars(read(results(tmp_path, losses)))[3].met


def test_the_overview_has_a_column_a_cell_and_marks_what_is_missed(tmp_path):
    (tmp_path / "a").mkdir()
    fine = read(results(tmp_path / "a", {"whitened": [1, 2], "loss_free": [1, 2]}))
    uneven = {"whitened": [1, 2], "loss_free": [1, 2], "softmax_offset": [2, 3]}
    told = overview({"a": fine, "b": read(results(tmp_path, uneven, max_vio=0.25))})
    assert told[0] == "| bar | a | b |"
    assert told[2] == "| seeds | 2 | 2 |"
    rows = {cells[1].strip(): cells[2:4] for cells in (line.split("|") for line in told)}
    vio = [cell.strip() for cell in rows["MaxVio held out, worst layer (0.05, 0.15)"]]
    assert vio == ["0.000, 0.000", "**0.250, 0.000**"]
    control = [cell.strip() for cell in rows["loss less that of softmax_offset"]]
    assert control == ["", "-40.00 [-40.00, -40.00] %"]
    # No control in one; twice -1.0 in the other, no spread, so no test.
    row = rows["p of the difference to softmax_offset's loss (Holm, over cells)"]
    assert [cell.strip() for cell in row] == ["", ""]


def test_p_is_that_of_the_paired_test(tmp_path):
    table = read(results(tmp_path, {"whitened": [1.0, 1.1, 1.2], "switch": [1.3, 1.2, 1.4]}))
    expected = ttest_1samp([0.3, 0.1, 0.2], 0.0).pvalue
    assert p_value(table["switch", "loss"]) == pytest.approx(expected, rel=1e-6)


def test_of_several_tests_each_is_corrected_and_their_order_kept():
    # 3 · 0.01; 2 · 0.03; 0.05, but no less than the one before it.
    assert holm([0.03, 0.01, 0.05]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_difference_between_two_variants_over_some_seeds(tmp_path):
    losses = {"whitened": [1.0, 1.0, 9.0], "switch": [1.5, 1.7, 9.0], "loss_free": [1.0, 1.0]}
    file = results(tmp_path, losses)
    (told,) = between({"a": read(file, "whitened", (0, 1))}, "loss", "switch", "whitened")
    # 0.5 and 0.7: Student's t of one degree of freedom is 12.7, times 0.1.
    assert told == ("a: loss of switch less that of whitened: +0.6000 [-0.6706, +1.8706], 2 seeds")
    with pytest.raises(ValueError, match="a has no loss of soft; it has that of whitened, switch"):
        between({"a": read(file)}, "loss", "soft", "whitened")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--between=loss,whitened"], "is not METRIC,A,B"),
        (["--between=loss,soft,whitened"], "cell has no loss of soft; it has that of whitened"),
        (["--between=loss,whitened,whitened"], "are one variant, or share no seed"),
        (["--seeds=a"], "--seeds=a is no list of numbers"),
        (["--seeds=7"], "cell has no run of whitened with these seeds"),
    ],
)
def test_a_command_that_asks_for_what_is_not_there_is_told_so(
    tmp_path, monkeypatch, capsys, flags, said
):
    file = results(tmp_path, {"whitened": [1.0, 1.1], "loss_free": [1.3, 1.4]})
    monkeypatch.setattr(sys, "argv", ["summary", file, *flags])
    with pytest.raises(SystemExit):
        main()
    assert said in capsys.readouterr().err


def test_the_command_prints_a_difference(tmp_path, monkeypatch, capsys):
    file = results(tmp_path, {"whitened": [1.0, 1.1], "loss_free": [1.3, 1.4]})
    flags = ["--between=loss,loss_free,whitened", "--seeds=0,1"]
    monkeypatch.setattr(sys, "argv", ["summary", file, *flags])
    main()
    told = capsys.readouterr().out
    assert told.startswith("cell: loss of loss_free less that of whitened: +0.3000 [")


def test_a_rival_that_lacks_seeds_is_compared_with_nobody(tmp_path):
    losses = {"whitened": [1.0, 1.1], "loss_free": [1.3, 1.4], "switch": [0.1]}
    told = verdict(bars(read(results(tmp_path, losses)))[3])
    assert told.endswith("loss_free: met")


def test_the_pages_have_the_tables_of_the_files():
    names = [*sorted(STUDY.glob("results/*_e32.json")), *sorted(STUDY.glob("results/*_e8.json"))]
    cells = {path.stem: read(str(path)) for path in names}
    page = (ROOT / "docs/routing.md").read_text()
    assert "\n".join(overview(cells)) in page
    tables = (STUDY / "README.md").read_text()
    for cell, table in cells.items():
        told = ["", f"### {cell}", "", *lines(table), "", *map(verdict, bars(table)), ""]
        assert "\n".join(told) in tables
