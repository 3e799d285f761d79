"""A run whose newest checkpoint is damaged goes on from the one before."""

import json
import logging
import shutil

import pytest

from emoe_jax import sharding
from emoe_jax.checkpoint import CheckpointError
from tests.train.tiny import lm_tree, mesh_of_one
from train import loop, provenance
from train.config import digest, freeze
from train.logs import read_metrics
from train.loop import train


def names(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def losses(workdir):
    return {row["step"]: row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row}


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.fixture(scope="module")
def damaged(finished, tmp_path_factory):
    """A copy of the finished run without half of a file of its newest checkpoint, trained again."""
    workdir = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(finished.workdir, workdir)
    file = largest(workdir / "checkpoints" / "24" / "state")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", mesh_of_one)
        level = loop.LOGGER.level
        loop.LOGGER.setLevel(logging.INFO)
        loop.LOGGER.addHandler(handler)
        train(lm_tree(finished.source), workdir)
        loop.LOGGER.removeHandler(handler)
        loop.LOGGER.setLevel(level)
    return workdir, lines


def test_the_run_goes_on_from_the_step_before_to_the_same_bits(finished, damaged):
    workdir, lines = damaged
    assert losses(workdir) == losses(finished.workdir)
    again = (workdir / "metrics.discarded.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in again} == set(range(17, 25))
    assert f"resuming {workdir} from step 16" in lines


def test_what_was_damaged_is_said_and_kept(finished, damaged):
    workdir, lines = damaged
    (told,) = [line for line in lines if "is damaged" in line]
    assert told.startswith("the checkpoint of step 24 is damaged, now named 24.damaged: ")
    assert names(workdir) == ["16", "24", "24.damaged"]  # keep_last=2 counts whole ones alone
    for file in (finished.workdir / "checkpoints/24").rglob("*"):
        kept = (
            workdir
            / "checkpoints/24.damaged"
            / file.relative_to(finished.workdir / "checkpoints/24")
        )
        assert kept.exists()


@pytest.fixture
def copy(finished, tmp_path, one_device):
    workdir = tmp_path / "run"
    shutil.copytree(finished.workdir, workdir)
    return workdir


def test_where_none_is_whole_the_run_refuses_and_nothing_is_touched(finished, copy, monkeypatch):
    flip(copy / "checkpoints/24/run/metadata")
    (copy / "checkpoints/16/state/manifest.ocdbt").unlink()
    monkeypatch.setattr(loop, "begin_train", None)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError) as caught:
        train(lm_tree(finished.source, steps=30), copy)
    words = str(caught.value)
    assert f"No checkpoint in {copy / 'checkpoints'} is whole:\n  step 24: " in words
    assert "\n  step 16: " in words
    assert "Put a copy of one of these folders in its place, or" in words
    after = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    assert after == before


def test_nothing_is_renamed_where_the_run_is_refused_for_another_reason(finished, copy):
    flip(copy / "checkpoints/24/run/metadata")
    with pytest.raises(ValueError, match=r"another model .*model.moe.top_k: 2 -> 1"):
        train(lm_tree(finished.source, moe={"top_k": 1}), copy)
    with pytest.raises(ValueError, match="is at step 16 already"):
        train(lm_tree(finished.source, steps=12), copy)
    assert names(copy) == ["16", "24"]


# ------------------------------------------------------------------------- who made a checkpoint


def meta_of(workdir, step):
    return json.loads((workdir / f"checkpoints/{step}/run/metadata").read_text())["meta"]


def test_a_checkpoint_says_who_made_it(finished):
    made = meta_of(finished.workdir, 24)["made"]
    config = json.loads((finished.workdir / "config.json").read_text())
    assert made["config"] == config
    assert made["digest"] == digest(config)
    assert len(made["tokenizer"]) == 64
    assert {"python", "jax", "orbax-checkpoint"} < made["versions"].keys()


def test_another_tokenizer_of_the_same_size_is_refused(finished, copy):
    file = copy / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    words = r"tokenizer.json is not the tokenizer of the checkpoint .*put the file back"
    with pytest.raises(ValueError, match=words):
        train(lm_tree(finished.source), copy)


def test_other_versions_are_told(finished, monkeypatch, caplog):
    saved = meta_of(finished.workdir, 24)
    del saved["guard"]
    monkeypatch.setattr(
        provenance.tables, "versions", lambda: saved["made"]["versions"] | {"jax": "99"}
    )
    provenance.check(freeze(lm_tree(finished.source)), saved, finished.workdir)
    (record,) = caplog.records
    assert record.getMessage().endswith(f"jax: {saved['made']['versions']['jax']!r} -> '99'")
