"""The benchmark of starts, with a script in the place of Python."""

import json
import os
import sys

import pytest

from train.bench_start import starts


def python(tmp_path, monkeypatch, script):
    file = tmp_path / "python"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(file))


def test_one_start_is_cold_and_all_others_find_its_cache(tmp_path, monkeypatch):
    log = tmp_path / "log"
    # Were it not killed after its first step, the test would take minutes.
    script = f"""echo "$JAX_COMPILATION_CACHE_DIR $*" >> {log}
echo reading; echo "step 1/20  loss 3"; exec sleep 600"""
    python(tmp_path, monkeypatch, script)
    cold, warm = starts("configs/lm_tiny.py", ["--config.steps=20"], 2)
    assert (cold["start"], cold["rounds"], warm["start"], warm["rounds"]) == ("cold", 1, "warm", 2)
    assert 0 < warm["start_ms_min"] <= warm["start_ms_max"] < 600e3
    caches, commands = zip(
        *(line.split(" ", 1) for line in log.read_text().splitlines()), strict=True
    )
    assert len(set(caches)) == 1
    assert not os.path.exists(caches[0])
    # Each is a new run of the same experiment.
    assert len(set(commands)) == 3
    for command in commands:
        assert command.startswith("-m train --workdir=")
        assert command.endswith("configs/lm_tiny.py --config.steps=20")
    json.dumps([cold, warm])


def test_a_run_that_ends_before_its_first_step_is_told(tmp_path, monkeypatch):
    python(tmp_path, monkeypatch, "echo 'error: no data' >&2; exit 2")
    with pytest.raises(ValueError, match="ended before its first step: error: no data"):
        starts("configs/lm_tiny.py", [], 1)
