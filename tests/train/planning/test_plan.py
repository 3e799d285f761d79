"""The planner from the command line's side: what it shows, and what it refuses."""

import dataclasses
import json
import subprocess
import sys

import pytest

from emoe_jax.sharding import MeshConfig
from tests.train.planning.shapes import small
from tests.train.tiny import vit_tree
from train.config import freeze
from train.planning import modes
from train.planning.chips import CHIPS
from train.planning.cost import PEAK
from train.planning.curve import IMBALANCES
from train.planning.program import planned
from train.planning.topology import Topology, parse


def ask(config, topology="cpu:8", **changes):
    place = parse(topology) if isinstance(topology, str) else topology
    asked = modes.Asked(config, place, PEAK, 0.0, None, model_only=True, whole=False)
    return dataclasses.replace(asked, **changes)


def fact(found, name):
    (rows,) = (rows for title, rows in found.tables.items() if title.startswith("Plan for"))
    return next(row["value"] for row in rows if row["fact"] == name)


def test_a_plan_of_a_tiny_model_compiled_for_this_machine(kept, tmp_path):
    config = planned(small({"data": 2, "expert": 4}), "cpu", 8)
    found = modes.plan(ask(config, keep=kept, model_only=False))
    assert fact(found, "fits") is True
    assert fact(found, "memory from") == "memory_analysis"
    assert found.refusal == ""
    assert "projected" in found.notes[0]
    *parts, total = found.tables["Memory of a device"]
    assert sum(row["compiled_GB"] for row in parts) == pytest.approx(total["compiled_GB"])
    flows = {row["purpose"]: row for row in found.tables["Collectives of a device in a step"]}
    # The bytes of the formula are those of the compiled schedule.
    exchange = flows["exchange"]
    assert exchange["scheduled_GB"] == pytest.approx(exchange["formula_GB"], rel=0.01)
    counts = {row["count"].split(",")[0]: row["a_step"] for row in found.tables["Operations"]}
    # On this machine grouped products are calls that the compiler does not count.
    assert 0 < counts["the compiler's own"] < counts["products of the traced program"]
    found.draw(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_what_does_not_fit_is_refused_with_the_smallest_change():
    config = small({"data": 8}, model={"remat": "none"})
    need = modes.plan(ask(config)).tables["Memory of a device"][-1]["formula_GB"] * 1e9
    tight = Topology(dataclasses.replace(CHIPS["cpu"], memory=0.9 * need), (8,))
    found = modes.plan(ask(config, tight))
    assert "do not fit" in found.refusal
    assert "--config." in found.refusal
    none = Topology(dataclasses.replace(CHIPS["cpu"], memory=1000.0), (8,))
    assert "take more devices" in modes.plan(ask(config, none)).refusal
    with pytest.raises(ValueError, match="nothing fits"):
        modes.search_plan(ask(config, none), best=0)


@pytest.mark.parametrize("name", ["v4:4x4x4", "v5e:4x4", "v6e:16x16", "7x:4x4x4", "b200:8x2"])
def test_every_kind_of_chip_is_planned_by_the_model_alone(name):
    place = parse(name)
    config = dataclasses.replace(small(), batch=place.devices, mesh=MeshConfig(expert=4))
    assert 0 < fact(modes.plan(ask(config, name)), "projected MFU") < 1


def test_images_are_planned_too():
    config = planned(freeze(vit_tree(batch=16, mesh={"expert": 4})), "tpu", 16)
    found = modes.plan(ask(config, "v5e:4x4"))
    assert fact(found, "tokens or images a step") == 16
    assert 0 < fact(found, "projected MFU") < 1


def test_a_search_is_a_ranked_table():
    (rows,) = modes.search_plan(ask(small(), "cpu:4"), best=0).tables.values()
    assert [row["rank"] for row in rows] == list(range(1, 21))
    times = [row["projected_s"] for row in rows]
    assert times == sorted(times)


def test_imbalance_bends_the_curve(tmp_path):
    found = modes.curve_plan(ask(small({"expert": 8}), "cpu:8"))
    (rows,) = found.tables.values()
    weak = [row for row in rows if row["kind"] == "weak" and row["devices"] == 8]
    assert [row["max_vio"] for row in weak] == list(IMBALANCES)
    assert weak[0]["seconds"] < weak[-1]["seconds"]
    assert weak[0]["rounds"] == 1 < weak[-1]["rounds"]
    found.draw(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def run(*arguments):
    command = [sys.executable, "-m", "train.plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_the_program_writes_what_it_prints(tmp_path):
    file = tmp_path / "plan.json"
    done = run(
        "--config=configs/lm_c4.py:400b",
        "--topology=v6e:16x16",
        "--model_only",
        "--config.mesh.expert=32",
        "--config.accumulate=4",
        f"--json={file}",
    )
    # 404 billion parameters with their moments are 4.8 TB, and 256 chips have 8.8.
    assert done.returncode == 2
    assert "do not fit the 34.4 GB of v6e" in done.stderr
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    facts = {row["fact"]: row["value"] for row in rows if "fact" in row}
    assert facts["fits"] is False
    assert facts["parameters"] == pytest.approx(404e9, rel=0.02)
