"""Training from start to end: what a run leaves, how it resumes, and what it refuses."""

import base64
import errno
import json
import logging
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from emoe_jax import sharding
from emoe_jax.checkpoint import CheckpointError, Checkpoints
from tests.train.tiny import lm_tree, mesh_of_one, vit_tree, write_corpus
from train import claim, loop
from train.config import freeze, to_json
from train.logs import RunLog, read_metrics
from train.loop import train
from train.provenance import identity
from train.run import build

ROOT = pathlib.Path(__file__).parents[2]


def losses(workdir):
    rows = read_metrics(workdir)
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def saved_steps(workdir):
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def tree_of(workdir):
    return json.loads((workdir / "config.json").read_text())


# ------------------------------------------------------------------------------- what a run leaves


def test_metrics_hold_every_step_and_both_evaluations(finished):
    rows = read_metrics(finished.workdir)
    assert [row["step"] for row in rows] == list(range(1, 25))
    scalars = {"train/loss", "train/penalty", "train/grad_norm", "train/learning_rate"}
    scalars |= {"train/tokens_per_second", "router/layer_00/max_vio", "router/layer_01/gate"}
    assert all(scalars <= row.keys() for row in rows)
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    evaluated = [row for row in rows if "eval/bits_per_byte" in row]
    assert [row["step"] for row in evaluated] == [12, 24]
    last = {name: value for name, value in evaluated[-1].items() if name.startswith("eval/")}
    assert last == pytest.approx(finished.scalars)
    assert evaluated[-1]["eval/loss"] < evaluated[0]["eval/loss"] < rows[0]["train/loss"]
    # One step of warm-up from zero, then the peak.
    assert rows[0]["train/learning_rate"] == 0.0
    assert rows[1]["train/learning_rate"] == pytest.approx(1e-2)


def test_the_folder_holds_config_tokenizer_events_and_checkpoints(finished):
    assert freeze(tree_of(finished.workdir)) == freeze(lm_tree(finished.source))
    tokenizer = tokenizers.Tokenizer.from_file(str(finished.workdir / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 258
    events = list(finished.workdir.glob("events.out.tfevents.*"))
    assert len(events) == 1
    assert events[0].stat().st_size > 1000
    # The newest two; the best by held-out loss is among them.
    assert saved_steps(finished.workdir) == [16, 24]
    assert not list(finished.workdir.glob("*.tmp"))


# --------------------------------------------------------------------------------------- resuming


class Stopped(NamedTuple):
    """The finished run's experiment, with a full disk at the second checkpoint, started again.

    What the first start left is aged in between, see `age`.
    """

    workdir: pathlib.Path
    error: CheckpointError
    saved: list[int]
    losses: dict[int, float]
    closed: list[bool]
    lines: list[str]


@pytest.fixture(scope="module")
def stopped(finished, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    tree = lm_tree(finished.source, profile=2)
    messages = Messages()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", mesh_of_one)
        with pytest.MonkeyPatch.context() as disk:
            closed = fill_disk(disk, 16)
            with pytest.raises(CheckpointError) as caught:
                train(tree, workdir)
        first = workdir, caught.value, saved_steps(workdir), losses(workdir), closed
        age(workdir)
        level = loop.LOGGER.level
        loop.LOGGER.setLevel(logging.INFO)
        logging.getLogger("train").addHandler(messages)
        tree.eval_every = 24
        train(tree, workdir)
        logging.getLogger("train").removeHandler(messages)
        loop.LOGGER.setLevel(level)
    return Stopped(*first, messages.lines)


def age(workdir):
    """Writes step 8 and config.json as of before shards, the exchange, the guard and the seal."""
    file = workdir / "checkpoints" / "8" / "run" / "metadata"
    run = json.loads(file.read_text())
    del run["sha256"], run["metrics"], run["meta"]["made"]
    run["digests"] = {name: entry["digest"] for name, entry in run.pop("arrays").items()}
    assert run["meta"]["data"].pop("shards") == 1
    assert run["meta"].pop("guard") == {"skipped": 0, "row": 0, "rollbacks": []}
    moe = run["meta"]["model"]["moe"]
    moe["basis"] = {"rank": 16, "method": "qr", "companion": False}
    for name in ("offset", "subspace", "whitening"):
        del moe["routing"][name]
    (position,) = run["data_state"].values()
    run["data_state"] = [base64.b64encode(json.dumps(position).encode()).decode()]
    file.write_text(json.dumps(run))
    tree = tree_of(workdir)
    del tree["data"]["shards"], tree["moe"]["exchange"]
    (workdir / "config.json").write_text(json.dumps(tree))


def test_a_rank_that_is_whatever_fits_is_the_number_it_comes_to():
    numbers = {"router": "eigen", "basis": {"rank": 16}}
    fits = {"router": "eigen", "basis": {"rank": 0}}
    same = [identity(freeze(lm_tree(moe=moe))) for moe in (numbers, fits)]
    assert same[0] == same[1]
    assert same[0]["model"]["moe"]["basis"]["rank"] == 16


def test_without_experts_their_options_are_no_part_of_a_run():
    dense, other = (
        identity(freeze(lm_tree(model={"moe_every": 0}, moe={"router": router})))
        for router in ("loss_free", "whitened")
    )
    assert dense == other
    assert "moe" in identity(freeze(lm_tree()))["model"]


def fill_disk(patch, at):
    """Lets orbax find no space at a step; tells whether logs that are closed have closed files."""
    save, close, closed = Checkpoints.save, RunLog.close, []

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def failing(self, step, *args, **kwargs):
        if step == at:
            self.wait()
            patch.setattr(self._manager, "save", full)
        return save(self, step, *args, **kwargs)

    def watched(self):
        close(self)
        closed.append(self._file.closed)

    patch.setattr(Checkpoints, "save", failing)
    patch.setattr(RunLog, "close", watched)
    return closed


class Messages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def test_a_full_disk_says_what_is_intact_and_closes_the_log(stopped):
    words = str(stopped.error)
    assert "The checkpoint of step 16 could not be written" in words
    assert "No space left on device" in words
    assert "The checkpoints of earlier steps [8] are intact. Free space there" in words
    assert stopped.saved == [8]
    assert stopped.closed == [True]


def test_a_resumed_run_equals_an_uninterrupted_one_step_by_step(finished, stopped):
    expected = losses(finished.workdir)
    assert list(stopped.losses) == list(range(1, 17))
    assert stopped.losses == {step: expected[step] for step in stopped.losses}
    # Steps 9 to 16 came after the last checkpoint: they are done again, to the same bits.
    assert losses(stopped.workdir) == expected
    discarded = (stopped.workdir / "metrics.discarded.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in discarded} == set(range(9, 17))
    assert saved_steps(stopped.workdir) == [16, 24]


def test_a_resumed_run_says_where_it_goes_on_and_what_changed(stopped):
    assert f"resuming {stopped.workdir} from step 8" in stopped.lines
    changes = [line for line in stopped.lines if "configuration changed" in line]
    assert changes == ["the configuration changed since this run began: eval_every: 12 -> 24"]
    assert tree_of(stopped.workdir)["eval_every"] == 24


def test_each_start_wrote_a_profile(stopped):
    assert len(list((stopped.workdir / "profile").rglob("*.xplane.pb"))) == 2


def test_nothing_is_compiled_after_the_first_step_but_checkpoint_digests(stopped):
    (told,) = [line for line in stopped.lines if "one executable" in line]
    assert told.startswith("the training step is one executable, compiled before step 9;")
    assert told.endswith(", 0 others")


def test_a_finished_run_only_evaluates_and_prints(finished, one_device, capsys, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in finished.workdir.rglob("*.jsonl")}
    steps = saved_steps(finished.workdir)
    monkeypatch.setattr(loop, "begin_train", None)
    scalars, rows = train(lm_tree(finished.source, prompt="the "), finished.workdir)
    assert scalars == pytest.approx(finished.scalars, rel=1e-6)
    assert [row["layer"] for row in rows] == ["layer_00", "layer_01"]
    printed = capsys.readouterr().out
    assert "step 24: held out" in printed
    assert "A continuation of 'the ':\nthe " in printed
    assert f"run folder: {finished.workdir}" in printed
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert saved_steps(finished.workdir) == steps
    (finished.workdir / "config.json").write_text(to_json(lm_tree(finished.source)))


def test_a_killed_process_goes_on_and_its_losses_agree(finished, tmp_path):
    config = tmp_path / "experiment.py"
    config.write_text(
        "from tests.train.tiny import lm_tree\n"
        f"def get_config():\n    return lm_tree({finished.source!r}, checkpoint={{'every': 2}})\n"
    )
    workdir = tmp_path / "run"
    with start(config, workdir) as process:
        try:
            while not saved_steps(workdir):
                assert process.poll() is None, process.communicate()
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 24 not in saved_steps(workdir)
    with start(config, workdir) as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "resuming" in err
    assert "CheckpointManager" not in err  # what orbax tells of every file is not for the user
    assert "Traceback" not in err
    # Compiled as users' programs are, where the test's own process is not: equal to rounding.
    assert losses(workdir) == pytest.approx(losses(finished.workdir), rel=1e-4)


def start(config, workdir):
    arguments = [f"--config={config}", f"--workdir={workdir}"]
    environment = os.environ | {"XLA_FLAGS": ""}
    return subprocess.Popen(
        [sys.executable, "-m", "train", *arguments],
        cwd=ROOT,
        env=environment | {"JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache")},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


# ----------------------------------------------------------------------------------- other options


@pytest.mark.parametrize(
    ("profile", "steps", "start", "expected"),
    [
        (0, 24, 0, []),
        (3, 24, 0, [11, 12, 13]),
        (3, 24, 8, [19, 20, 21]),
        (3, 24, 20, [22, 23, 24]),  # fewer steps are left
        (3, 2, 0, [1, 2]),
        (0, 24, 23, []),
    ],
)
def test_profiled_steps_lie_within_the_run(profile, steps, start, expected):
    config = freeze(lm_tree(profile=profile, steps=steps))
    assert list(loop._profiled(config, start)) == expected


# -------------------------------------------------------------------------------- what it refuses


def test_another_model_in_the_workdir_is_refused_and_nothing_lost(finished, one_device):
    before = {path: path.read_bytes() for path in finished.workdir.rglob("*") if path.is_file()}
    tree = lm_tree(finished.source, model={"width": 32})
    with pytest.raises(ValueError, match=r"holds a run of another model.*model\.width: 16 -> 32"):
        train(tree, finished.workdir)
    after = {path: path.read_bytes() for path in finished.workdir.rglob("*") if path.is_file()}
    assert after == before


def test_fewer_steps_than_are_saved_are_refused(finished, one_device):
    words = f"steps=12, but {finished.workdir} is at step 24 already; set steps to 24 or more"
    with pytest.raises(ValueError, match=re.escape(words)):
        train(lm_tree(finished.source, steps=12), finished.workdir)
    assert tree_of(finished.workdir)["steps"] == 24


def refused(tree, workdir, error, words, monkeypatch):
    """The error comes before anything is compiled."""
    monkeypatch.setattr(loop, "begin_evaluate", None)
    monkeypatch.setattr(loop, "begin_train", None)
    monkeypatch.setattr(jax, "jit", lambda *_, **__: lambda *_: pytest.fail("compiled"))
    with pytest.raises(error, match=words):
        train(tree, workdir)
    assert not (workdir / "config.json").exists()


def test_a_folder_in_which_another_training_is_at_work_is_refused(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "PATIENCE_S", 0.0)
    with claim.claim(tmp_path):
        words = "in use by another training"
        refused(lm_tree(finished.source), tmp_path, ValueError, words, monkeypatch)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch": 12}, r"batch=12 is not a multiple of 8 \(8 shards .* set batch to 16"),
        ({"batch": 4}, "batch=4 is not a multiple of 8 .* set batch to 8"),
        ({"data": {"shards": 3}}, r"batch=8 is not a multiple of data\.shards=3"),
        ({"batch": 8, "accumulate": 2}, "not a multiple of 16 .*accumulate=2.*set batch to 16"),
        ({"mesh": {"fsdp": 3}}, "fsdp=3 .* does not multiply to the 8 devices at hand"),
        ({"mesh": {"tensor": 8}, "model": {"width": 12}}, r"mesh\.tensor=8 vs"),
        ({"moe": {"router": "eigne"}}, "router='eigne' is not known; choose one of whitened"),
        ({"moe": {"routing": {"z_weight": 0.1}}}, "the router 'whitened' does not read it"),
        ({"moe": {"router": "soft"}}, "top_k=2; set top_k to 4"),
        ({"moe": {"router": "expert_choice"}}, "choose another router, or set routing.acausal"),
        ({"optim": {"trainable": ("moe", "hed")}}, "optim.trainable names 'hed'.* embedding, "),
        ({"prompt": "x" * 40}, "the prompt's 41 tokens .* shorten the prompt"),
    ],
)
def test_impossible_experiments_are_refused_before_anything_is_compiled(
    finished, tmp_path, changes, words, monkeypatch
):
    refused(lm_tree(finished.source, **changes), tmp_path, ValueError, words, monkeypatch)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", r"empty\.txt is empty; remove it or give it text"),
        ("latin.txt", b"caf\xe9", r"latin\.txt is not UTF-8: byte 0xe9 at offset 3"),
        ("rows.jsonl", b"{]\n", r"rows\.jsonl:1 is no JSON"),
    ],
)
def test_unreadable_text_is_refused(tmp_path, name, content, words, monkeypatch):
    folder = tmp_path / "text"
    write_corpus(folder)
    (folder / name).write_bytes(content)
    tree = lm_tree(f"files:{folder}/*")
    refused(tree, tmp_path / "run", ValueError, words, monkeypatch)


def test_missing_data_are_refused(tmp_path, monkeypatch):
    tree = lm_tree(f"files:{tmp_path}/absent/*.txt")
    refused(tree, tmp_path / "a", FileNotFoundError, "absent", monkeypatch)
    tree = lm_tree("tfds:lm1b", data={"tfds_dir": str(tmp_path)})
    refused(tree, tmp_path / "b", FileNotFoundError, "'lm1b' is not prepared: look", monkeypatch)
    tree = vit_tree(data={"source": "tfds:cifar100", "tfds_dir": str(tmp_path)})
    refused(tree, tmp_path / "c", FileNotFoundError, "'cifar100' is not prepared", monkeypatch)


def test_images_of_another_size_are_refused(tmp_path, monkeypatch):
    tree = vit_tree(data={"image_size": 28})
    words = r"images of 8x8, but data\.image_size=28 asks for 28x28; set data\.image_size=8"
    refused(tree, tmp_path, ValueError, words, monkeypatch)


def test_another_tokenizer_than_the_runs_own_is_refused(finished, one_device):
    words = r"data\.vocab_size=300, but the tokenizer in .*tokenizer\.json has 258 ids; set"
    with pytest.raises(ValueError, match=words):
        train(lm_tree(finished.source, data={"vocab_size": 300}), finished.workdir)


def test_a_tokenizer_with_gaps_between_its_ids_fits_the_model(finished, tmp_path, one_device):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Special tokens take the ids from 256 on, the number of tokens so far.
    vocabulary = {character: i if i < 200 else 2 * i for i, character in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|bos|>", "<|eos|>"])
    backend.save(str(tmp_path / "gaps.json"))
    keys = {"tokenizer": str(tmp_path / "gaps.json"), "vocab_size": 4096}
    run = build(freeze(lm_tree(finished.source, data=keys)), tmp_path / "run")
    assert run.config.model.vocab_size == max(backend.get_vocab().values()) + 1 > 258
    run.abstract_batch(next(run.data.heldout_batches(8)), 8)


def test_a_token_outside_the_vocabulary_is_refused(finished, tmp_path, one_device):
    run = build(freeze(lm_tree(finished.source)), tmp_path / "run")
    batch = next(run.data.heldout_batches(8))
    batch["tokens"][0, 0] = 258
    with pytest.raises(ValueError, match="tokens hold id 258, but the model's vocabulary has"):
        run.abstract_batch(batch, 8)
    with pytest.raises(ValueError, match="tokens hold id 258"):
        run.to_devices(batch, 8)


def test_rows_of_another_batch_are_refused(finished, tmp_path, one_device):
    run = build(freeze(lm_tree(finished.source)), tmp_path / "run")
    batch = next(run.data.heldout_batches(8))
    with pytest.raises(ValueError, match=r"got 8 rows of a batch of 16; .* devices hold 16"):
        run.to_devices(batch, 16)


def test_the_config_file_is_whole(finished):
    assert (finished.workdir / "config.json").read_text() == to_json(lm_tree(finished.source))


def test_other_data_are_refused_and_nothing_is_lost(finished, one_device):
    tree = lm_tree(finished.source, data={"sequence_length": 16})
    with pytest.raises(ValueError, match=r"other data.*sequence_length: 32 -> 16.*--workdir"):
        train(tree, finished.workdir)
    assert saved_steps(finished.workdir) == [16, 24]


def test_another_model_of_the_same_shapes_is_refused(finished, one_device):
    tree = lm_tree(finished.source, moe={"top_k": 1})
    with pytest.raises(ValueError, match=r"another model.*model.moe.top_k: 2 -> 1"):
        train(tree, finished.workdir)
