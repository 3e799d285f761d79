"""Damaged inputs given to the programs themselves: an exit code, words, and no stack trace.

Inputs that a reader refuses in the worker are given to the program that reads them: its exception
must come out as "error: ..." and code 2, as of every other bad input (see tests/train/test_cli.py).
"""

import functools
import json
import os
import pathlib
from collections.abc import Iterator

import pytest

from tests.fuzz.campaign import ROOT, Campaign
from tests.fuzz.readers import READERS
from tests.fuzz.test_fuzz import SEED
from tests.fuzz.worker import write_input
from tests.train import forked

DATA = [
    *("--config.data.tokenizer=bytes", "--config.data.vocab_size=258"),
    *("--config.data.heldout_every=2", "--config.steps=1", "--config.optim.warmup=0"),
]
LM, VIT = (f"--config={ROOT}/configs/{name}.py" for name in ("lm_tiny", "vit_digits"))
TRAIN = ["train", LM, "--workdir=run", *DATA]
COMPARE = ["train.compare", VIT, "--workdir=study", "--options=options.json", "--seeds=2"]
CONVERT = ["train.convert", "--to=ours"]

# Whose inputs a program is given, and its arguments; none where these are the input.
PROGRAMS: dict[str, tuple[str, list[str]]] = {
    "train jsonl": ("jsonl", [*TRAIN, "--config.data.sources=('files:*.jsonl',)"]),
    "evaluate": ("config", ["train.evaluate", "--workdir=."]),
    "convert": ("weights", [*CONVERT, "--from=model.safetensors"]),
}
MORE = {
    "train": ("argv", []),
    "train txt": ("txt", [*TRAIN, "--config.data.sources=('files:*.*',)"]),
    "train parquet": ("parquet", [*TRAIN, "--config.data.sources=('files:*.parquet',)"]),
    "train tokenizer": ("tokenizer", [*TRAIN, "--config.data.tokenizer=tokenizer.json"]),
    "convert torch": ("torch", [*CONVERT, "--from=weights.pth", "--set", "num_heads=2"]),
    "compare": ("variants", [*COMPARE, "--routers=hot,no_offset,hotter"]),
    "report": ("config", ["train.report", "--workdir=."]),
    "sample": ("config", ["train.sample", "--workdir=.", "--prompt=The"]),
}


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    with Campaign(tmp_path_factory.mktemp("refused")) as campaign:
        yield campaign


def refused(campaign: Campaign, reader: str, count: int) -> list[int]:
    """The first cases that a reader refuses."""
    found: list[int] = []
    case = 0
    while len(found) < count:
        if campaign.run(reader, SEED, case).came != "valid":
            found.append(case)
        case += 1
    return found


def run(program: str, case: int, folder: pathlib.Path) -> forked.Ended:
    """Runs a program on a damaged input."""
    reader, arguments = (PROGRAMS | MORE)[program]
    files = READERS[reader].case(reader, SEED, case)
    write_input(folder, files)
    words = arguments or [*json.loads(files["argv.json"]), "--workdir=run"]
    return forked.run(words, functools.partial(os.chdir, folder))


def check(campaign: Campaign, folder: pathlib.Path, programs: list[str], count: int) -> None:
    """Runs the programs on some cases each."""
    wrong = []
    for program in programs:
        reader = (PROGRAMS | MORE)[program][0]
        for case in refused(campaign, reader, count):
            code, _, err = run(program, case, folder / f"{program} {case}")
            told = [line for line in err.splitlines() if line.startswith("error: ")]
            if code != 2 or not told or "Traceback" in err:
                wrong.append(f"{program}: {reader} {SEED} {case}: {code} {err[-2000:]}")
    assert not wrong, "\n".join(wrong)


def test_programs_say_what_is_damaged(campaign: Campaign, tmp_path: pathlib.Path) -> None:
    check(campaign, tmp_path, list(PROGRAMS), 1)


@pytest.mark.soak
@pytest.mark.parametrize("program", PROGRAMS | MORE)
def test_programs_say_what_is_damaged_each_time(
    campaign: Campaign, tmp_path: pathlib.Path, program: str
) -> None:
    check(campaign, tmp_path, [program], 24)
