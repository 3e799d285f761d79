"""The programs as a user starts them: bad input ends with code 2 and words, not with a trace."""

import asyncio
import logging
import pathlib
import subprocess
import sys
import types

import pytest
import tensorstore

from tests.train import forked
from tests.train.forked import Ended
from train import cli

TINY = "--config=configs/lm_tiny.py"

COMPARE = ["train.compare", TINY, "--workdir={}"]
CASES = {
    "unknown key": ["train", TINY, "--workdir={}", "--config.moe.experst=4"],
    "unknown group": ["train", TINY, "--workdir={}", "--config.meo.experts=4"],
    "wrong type": ["train", TINY, "--workdir={}", "--config.steps=many"],
    "too deep": ["train", TINY, "--workdir={}", "--config.seed=" + "-" * 20000 + "1"],
    "impossible value": ["train", TINY, "--workdir={}", "--config.moe.top_k=9"],
    "unknown router": ["train", TINY, "--workdir={}", "--config.moe.router=eigne"],
    "no config": ["train", "--workdir={}"],
    "config not there": ["train", "--config=configs/lm_tinny.py", "--workdir={}"],
    "no workdir": ["train", TINY],
    "unknown flag": ["train", TINY, "--workdir={}", "--nonsense=1"],
    "json nowhere": ["train", TINY, "--workdir={}", "--json={}/absent/table.json"],
    "workdir is remote": ["train", TINY, "--workdir=gs://bucket/run"],
    # The option of the paper's recipe that switch does not read is unset, so that the next error
    # is met.
    "option unset": [
        "train",
        "--config=configs/vit_b16_emoe_adapter.py",
        "--workdir={}",
        "--config.moe.router=switch",
        "--config.moe.routing.orthogonality_weight=None",
        "--config.batch=0",
    ],
    "name of no parameter": [
        "train",
        TINY,
        "--workdir={}",
        "--config.optim.trainable=('moe','hed')",
    ],
    "half a place": ["train", TINY, "--workdir={}", "--num_processes=2", "--process_id=0"],
    "workdir is a file": ["train", TINY, "--workdir=LICENSE"],
    "evaluate without run": ["train.evaluate", "--workdir={}"],
    "sample without run": ["train.sample", "--workdir={}", "--prompt=The"],
    "report without run": ["train.report", "--workdir={}"],
    "compare nothing known": [*COMPARE, "--routers=eigne,switch"],
    "compare with nothing": [*COMPARE, "--routers=eigen,switch", "--baseline=softmax"],
    "options not there": [*COMPARE, "--routers=eigen,switch", "--options={}/none.json"],
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Every case."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    return {name: run(words, folder) for name, words in CASES.items()}


def run(words: list[str], folder: pathlib.Path) -> Ended:
    """A program with a folder in the place of braces."""
    return forked.run([word.replace("{}", str(folder)) for word in words])


JUDGED = [
    (
        "unknown key",
        "error: config key 'moe.experst' does not exist; did you mean 'moe.experts'?\n",
    ),
    ("unknown group", "config key 'meo.experts' does not exist; did you mean 'moe.experts'?"),
    ("wrong type", "--config.steps=many"),
    (
        "too deep",
        "--config.seed is given '------------...------------1', which is nested too deep",
    ),
    ("impossible value", "top_k=9 is more than experts=4: a token can go to at most all"),
    ("unknown router", "router='eigne' is not known; choose one of whitened, eigen"),
    ("no config", "Flag --config must have a value"),
    (
        "config not there",
        "--config=configs/lm_tinny.py: there is no such file; there are: conf",
    ),
    ("config not there", "configs/lm_tiny.py"),
    ("no workdir", "Flag --workdir must have a value"),
    ("unknown flag", "Unknown command line flag 'nonsense'"),
    ("json nowhere", "/absent does not exist"),
    ("half a place", "error: --num_processes=2 --process_id=0 needs --coordinator too"),
    ("workdir is a file", "LICENSE"),
    ("workdir is remote", "--workdir=gs://bucket/run is not a local folder"),
    ("option unset", "batch=0 must be above zero"),
    (
        "name of no parameter",
        "optim.trainable names 'hed', which is no part of any parameter's",
    ),
    ("compare nothing known", "'eigne'"),
    ("compare with nothing", "--baseline=softmax is not among the variants"),
    ("options not there", "none.json: there is no such file"),
    ("report without run", "holds no run: there is no config.json; train one there with"),
    ("evaluate without run", "holds no run: there is no config.json; train one there with"),
    ("sample without run", "holds no run: there is no config.json; train one there with"),
]


@pytest.mark.parametrize(("case", "words"), JUDGED)
def test_bad_input_ends_with_code_2_and_the_words_that_help(ended, case, words):
    code, out, err = ended[case]
    assert code == 2, err
    assert words in err
    assert "Traceback" not in err
    assert out == ""


def test_the_cases_are_all_judged(ended):
    assert {case for case, _ in JUDGED} == CASES.keys()
    assert all(result.err.count("error: ") == 1 for result in ended.values())


def test_a_process_of_its_own_ends_in_order_too(tmp_path):
    # Data are looked for when the native products are being compiled already, by a thread.
    words = ["train", TINY, f"--workdir={tmp_path}/run", f"--config.data.sources={tmp_path}/none"]
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=forked.ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2, done.stderr
    assert f"{tmp_path}/none" in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr


def test_a_trace_is_shown_to_those_who_ask(tmp_path):
    code, _, err = run(["train.evaluate", "--workdir={}", "--trace"], tmp_path)
    assert code == 1
    assert "Traceback" in err
    assert "FileNotFoundError" in err


def test_overrides_are_python_values_or_text():
    texts = ["mesh.fsdp=2", "data.sources=('a', 'b')", "prompt=The = union", "moe.router=eigen"]
    assert cli.overrides(texts) == {
        "mesh.fsdp": 2,
        "data.sources": ("a", "b"),
        "prompt": "The = union",
        "moe.router": "eigen",
    }
    # What Python's parser raises for these is no SyntaxError.
    for text in ("{[]: 1}", "(" * 5000, "-" * 5000 + "1", "9" * 5000):
        assert cli.overrides([f"prompt={text}"]) == {"prompt": text}
    with pytest.raises(ValueError, match="--override=steps is not of the form KEY=VALUE"):
        cli.overrides(["steps"])


@pytest.mark.parametrize("trace", [False, True])
def test_stacks_of_writers_are_shown_where_traces_are_asked_for(trace, monkeypatch):
    monkeypatch.setattr(
        cli, "flags", types.SimpleNamespace(FLAGS=types.SimpleNamespace(trace=trace))
    )

    def logged(folder, message):
        try:
            raise OSError("no space")
        except OSError:
            where = f"/site-packages/{folder}/writer.py", 3
            record = logging.LogRecord("absl", logging.ERROR, *where, message, (), sys.exc_info())
        return cli._is_news(record), record.exc_info is not None

    assert logged("orbax/checkpoint", "it failed") == (True, trace)
    assert logged("asyncio", "Task exception was never retrieved") == (True, trace)
    assert logged("grain", "it failed") == (True, True)
    assert logged("orbax/checkpoint", "Given directory is read only=x")[0] is False


def test_writes_that_end_after_a_failed_save_say_nothing(monkeypatch):
    told: list[str] = []

    def tell(given):
        told.append(str(given.exc_value))

    def end_after_the_loop():
        promise, write = tensorstore.Promise.new()

        async def wait():
            await write

        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)  # of the task that never ends
        task = loop.create_task(wait())
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        promise.set_result(None)
        assert not task.done()

    class Ends:
        def __del__(self):
            raise RuntimeError("another one")

    monkeypatch.setattr(sys, "unraisablehook", tell)
    end_after_the_loop()
    assert told == ["Event loop is closed"]
    monkeypatch.setattr(sys, "unraisablehook", cli._without_late_writes(tell))
    end_after_the_loop()
    Ends()
    assert told == ["Event loop is closed", "another one"]
