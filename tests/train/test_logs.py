"""The run's logs: what is written reads back, and a resumed run reads as one."""

import io
import json
import math
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event, SessionLog

from train.logs import RunLog, discard_after, read_metrics, read_routing


def run_log(workdir: Path, **kwargs: object) -> RunLog:
    defaults = {"total_steps": 100, "unit": "tokens", "console": Console(file=io.StringIO())}
    return RunLog(workdir, **(defaults | kwargs))  # type: ignore[arg-type]


def lines(workdir: Path, name: str = "metrics.jsonl") -> list[str]:
    return (workdir / name).read_text().splitlines()


def events(workdir: Path) -> list[Event]:
    """Every event, in the order in which TensorBoard reads the files.

    A TFRecord is a length (8 bytes), its checksum (4), the data, and theirs (4).
    """
    found = []
    for file in sorted(workdir.glob("events.out.tfevents.*")):
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def scalar_events(workdir: Path) -> list[tuple[int, str, float]]:
    return [
        (event.step, value.tag, value.simple_value)
        for event in events(workdir)
        for value in event.summary.value
        if value.WhichOneof("value") == "simple_value"
    ]


def test_scalars_are_lines_and_events(tmp_path: Path) -> None:
    with run_log(tmp_path / "new") as log:
        log.write(1, {"train/loss": 2.5, "router/layer_03/max_vio": jnp.float32(0.1)})
        log.write(2, {"train/loss": np.float32(0.1)})
        log.write(2, {"eval/loss": 3})
        assert lines(tmp_path / "new")[0] == (
            '{"step": 1, "train/loss": 2.5, "router/layer_03/max_vio": 0.10000000149011612}'
        )
    assert read_metrics(tmp_path / "new") == [
        {"step": 1, "train/loss": 2.5, "router/layer_03/max_vio": float(np.float32(0.1))},
        {"step": 2, "train/loss": float(np.float32(0.1)), "eval/loss": 3.0},
    ]
    assert scalar_events(tmp_path / "new") == [
        (1, "train/loss", 2.5),
        (1, "router/layer_03/max_vio", pytest.approx(0.1)),
        (2, "train/loss", pytest.approx(0.1)),
        (2, "eval/loss", 3.0),
    ]


@given(value=st.floats())
def test_every_float_reads_back_to_the_same_bits_from_strict_json(
    tmp_path_factory: pytest.TempPathFactory, value: float
) -> None:
    def refuse(name: str) -> float:
        raise ValueError(name)

    folder = tmp_path_factory.mktemp("run")
    with run_log(folder) as log:
        log.write(0, {"x": value})
    json.loads(lines(folder)[0], parse_constant=refuse)
    ((read),) = read_metrics(folder)
    assert math.isnan(read["x"]) if math.isnan(value) else repr(read["x"]) == repr(value)


def test_what_is_not_finite_is_named(tmp_path: Path) -> None:
    with run_log(tmp_path) as log:
        log.write(0, {"a": math.nan, "b": math.inf, "c": -math.inf})
    assert lines(tmp_path) == ['{"step": 0, "a": "NaN", "b": "Infinity", "c": "-Infinity"}']


def test_a_resumed_run_reads_as_one(tmp_path: Path) -> None:
    with run_log(tmp_path) as log:
        for step in range(1, 6):
            log.write(step, {"loss": 10.0 + step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while it wrote
    with run_log(tmp_path, resume_step=3) as log:
        log.write(4, {"loss": 4.0})
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 11.0},
        {"step": 2, "loss": 12.0},
        {"step": 3, "loss": 13.0},
        {"step": 4, "loss": 4.0},
    ]
    assert lines(tmp_path, "metrics.discarded.jsonl") == [
        '{"step": 4, "loss": 14.0}',
        '{"step": 5, "loss": 15.0}',
    ]
    starts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
    assert starts == [0, 4]  # TensorBoard hides earlier events from there on
    assert len(list(tmp_path.glob("events.*"))) == 2


def test_a_new_run_in_an_old_folder_begins_with_an_empty_log(tmp_path: Path) -> None:
    with run_log(tmp_path) as log:
        log.write(0, {"loss": 1.0})
    with run_log(tmp_path) as log:
        log.write(0, {"loss": 2.0})
    assert read_metrics(tmp_path) == [{"step": 0, "loss": 2.0}]
    assert lines(tmp_path, "metrics.discarded.jsonl") == ['{"step": 0, "loss": 1.0}']


@given(steps=st.lists(st.integers(0, 9), max_size=12), keep=st.integers(-1, 10))
def test_discarding_keeps_every_line_in_one_of_the_two_files(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], keep: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    written = [f'{{"step": {step}, "x": 0.5}}' for step in sorted(steps)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in written))
    discard_after(folder, keep)
    discard_after(folder, keep)  # the second time nothing is left to do
    moved = folder / "metrics.discarded.jsonl"
    later = moved.read_text().splitlines() if moved.exists() else []
    assert lines(folder) + later == written
    assert [row["step"] for row in read_metrics(folder)] == sorted({s for s in steps if s <= keep})


def test_a_crash_before_the_rename_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = '{"step": 1, "x": 1.0}\n{"step": 2, "x": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_text(whole)

    def crash(self: Path, target: Path) -> None:
        raise OSError("pulled the plug")

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(OSError, match="pulled the plug"):
        discard_after(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == whole


def test_a_torn_last_line_is_left_out_and_a_torn_line_before_it_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "x": 1.0}\n{"step": 2, "x"')
    assert read_metrics(file) == [{"step": 1, "x": 1.0}]
    for wrong in ("{", "[1]", '{"x": 1.0}', '{"step": "1"}', ""):
        file.write_text('{"step": 1, "x": 1.0}\n' + wrong + '\n{"step": 2, "x": 2.0}\n')
        with pytest.raises(ValueError, match=r"Line 2 of .*is no metrics line.*Remove that line"):
            read_metrics(tmp_path)
        with pytest.raises(ValueError, match="Line 2"):
            run_log(tmp_path, resume_step=1)


def test_metrics_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no metrics at .*--workdir"):
        read_metrics(tmp_path / "none")


def test_steps_never_run_backwards(tmp_path: Path) -> None:
    with run_log(tmp_path, resume_step=5) as log:
        log.write(5, {"x": 1.0})
        with pytest.raises(ValueError, match=r"Step 4 comes after step 5.*resume_step"):
            log.write(4, {"x": 1.0})
        with pytest.raises(ValueError, match="cannot be called 'step'"):
            log.write(6, {"step": 1.0})


def test_arrays_are_lines_by_layer_rounded_to_six_digits(tmp_path: Path) -> None:
    with run_log(tmp_path) as log:
        arrays = {
            "layer_00/load": jnp.array([0.25, 1 / 3, 0.0]),
            "layer_00/spectrum": np.array([1234567.0, 1e-9]),
            "layer_02/load": [math.nan, math.inf, 1],
        }
        log.arrays(4, arrays)
        log.arrays(5, {})  # a model without experts
        log.arrays(6, {"layer_00/load": np.zeros(0)})
    assert lines(tmp_path, "routing.jsonl") == [
        '{"step": 4, "layer_00": {"load": [0.25, 0.333333, 0.0], "spectrum": [1234570.0, 1e-09]},'
        ' "layer_02": {"load": ["NaN", "Infinity", 1.0]}}',
        '{"step": 6, "layer_00": {"load": []}}',
    ]
    first, second = read_routing(tmp_path)
    assert (first["step"], second["step"]) == (4, 6)
    np.testing.assert_array_equal(first["layer_00"]["spectrum"], [1234570.0, 1e-9])
    np.testing.assert_array_equal(first["layer_02"]["load"], [math.nan, math.inf, 1.0])
    assert second.keys() == {"step", "layer_00"}
    assert read_metrics(tmp_path) == []


def test_arrays_of_a_resumed_run_read_as_one(tmp_path: Path) -> None:
    with run_log(tmp_path) as log:
        for step in range(1, 5):
            log.write(step, {"loss": 1.0})
            log.arrays(step, {"layer_00/load": [float(step)]})
    with (tmp_path / "routing.jsonl").open("a") as file:
        file.write('{"step": 5, "layer_')  # killed while it wrote
    with run_log(tmp_path, resume_step=2) as log:
        log.arrays(3, {"layer_00/load": [30.0]})
        log.arrays(3, {"layer_00/spectrum": [9.0]})  # two lines of one step
        with pytest.raises(ValueError, match=r"Step 2 comes after step 3.*resume_step"):
            log.arrays(2, {"layer_00/load": [2.0]})
    read = read_routing(tmp_path / "routing.jsonl")
    assert [(row["step"], row["layer_00"]["load"].tolist()) for row in read] == [
        (1, [1.0]),
        (2, [2.0]),
        (3, [30.0]),
    ]
    assert read[2]["layer_00"]["spectrum"].tolist() == [9.0]
    assert lines(tmp_path, "routing.discarded.jsonl") == [
        '{"step": 3, "layer_00": {"load": [3.0]}}',
        '{"step": 4, "layer_00": {"load": [4.0]}}',
    ]
    assert len(lines(tmp_path, "metrics.discarded.jsonl")) == 2


def test_a_damaged_log_is_refused_before_the_other_is_shortened(tmp_path: Path) -> None:
    metrics = '{"step": 1, "x": 1.0}\n{"step": 2, "x": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_text(metrics)
    (tmp_path / "routing.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match=r"Line 1 of .*routing\.jsonl"):
        discard_after(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == metrics


def test_arrays_of_another_form_are_refused(tmp_path: Path) -> None:
    with run_log(tmp_path) as log:
        for name in ("load", "step/load", "/load", "layer_00/"):
            with pytest.raises(ValueError, match="must be a layer's name, a slash, and a name"):
                log.arrays(1, {name: [1.0]})
        with pytest.raises(ValueError, match=r"'layer_00/load' has shape \(1, 2\)"):
            log.arrays(1, {"layer_00/load": [[1.0, 2.0]]})
    assert lines(tmp_path, "routing.jsonl") == []
    with pytest.raises(FileNotFoundError, match="no routing over time at"):
        read_routing(tmp_path / "none")


def test_loads_become_histograms(tmp_path: Path) -> None:
    with run_log(tmp_path) as log:
        log.histograms(7, {"router/layer_03/load": jnp.array([[1.0, 3.0], [3.0, jnp.nan]])})
        log.histograms(7, {"empty": np.array([np.inf])})
        found = [(e.step, v) for e in events(tmp_path) for v in e.summary.value]
    ((step, value),) = found
    assert (step, value.tag) == (7, "router/layer_03/load")
    assert (value.histo.num, value.histo.min, value.histo.max, value.histo.sum) == (3, 1, 3, 7)
    assert sum(value.histo.bucket) == 3


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    output = io.StringIO()
    with run_log(tmp_path / "run", enabled=False, console=Console(file=output)) as log:
        log.write(1, {"x": 1.0})
        log.histograms(1, {"y": np.ones(3)})
        log.arrays(1, {"layer_00/load": np.ones(3)})
        log.progress(1, loss=1.0, rate=1.0)
    assert not (tmp_path / "run").exists()
    assert output.getvalue() == ""


def test_plain_lines_come_first_at_intervals_and_last(tmp_path: Path) -> None:
    output, now = io.StringIO(), [0.0]
    console = Console(file=output, width=40)  # narrower than the lines, which are not wrapped
    with run_log(tmp_path, console=console, every_s=10, clock=lambda: now[0]) as log:
        for step in range(0, 101, 5):
            now[0] = float(step)  # one step a second
            log.progress(step, loss=2.0, rate=12345.6, mfu=0.4125, max_vio=0.5)
    printed = output.getvalue().splitlines()
    assert len(printed) == 11  # step 0, every ten seconds, step 100
    assert printed[0] == "step 0/100  loss 2.0000  12,346 tokens/s  MFU 41.2%  MaxVio 0.500"
    assert printed[4] == (
        "step 40/100  loss 2.0000  12,346 tokens/s  MFU 41.2%  MaxVio 0.500  left 0:01:00"
    )
    assert printed[-1].startswith("step 100/100 ")
    assert printed[-1].endswith("left 0:00:00")


def test_the_time_left_counts_from_the_resumed_step(tmp_path: Path) -> None:
    output, now = io.StringIO(), [1000.0]
    console = Console(file=output)
    with run_log(
        tmp_path, console=console, unit="images", resume_step=90, clock=lambda: now[0]
    ) as log:
        now[0] += 3600.0  # one step took an hour, nine are left
        log.progress(91, loss=math.nan, rate=1.0)
    assert output.getvalue() == "step 91/100  loss nan  1 images/s  left 9:00:00\n"


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100)
    with run_log(tmp_path, console=console) as log:
        log.progress(25, loss=2.0, rate=1000.0, mfu=0.5, max_vio=0.25)
    screen = output.getvalue()
    assert "25/100" in screen
    assert "loss 2.0000  1,000 tokens/s  MFU 50.0%  MaxVio 0.250" in screen


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"total_steps": 0}, "total_steps=0 must be at least 1"),
        ({"unit": "words"}, "unit='words' must be 'tokens' or 'images'"),
        ({"resume_step": -1}, "resume_step=-1 must be at least 0"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, wrong: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run_log(tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["x", None, {"a": None}, ["x"]])
def test_what_is_no_number_is_named_with_its_line(tmp_path: Path, value: object) -> None:
    lines = [json.dumps({"step": 1, "x": "NaN"}), json.dumps({"step": 2, "x": value})]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"Line 2 of .*metrics\.jsonl holds something else than n"):
        read_metrics(tmp_path)
    (tmp_path / "routing.jsonl").write_text(json.dumps({"step": 1, "layer_01": value}) + "\n")
    with pytest.raises(ValueError, match=r"Line 1 of .*routing\.jsonl holds something else than n"):
        read_routing(tmp_path)
