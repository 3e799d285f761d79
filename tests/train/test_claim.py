"""A run's folder belongs to one training at a time."""

import logging
import subprocess
import sys
import textwrap

import filelock
import pytest

from train import claim


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(claim, "PATIENCE_S", 0.1)


def test_second_training_is_refused_and_the_next_is_not(tmp_path):
    with (
        claim.claim(tmp_path),
        pytest.raises(ValueError, match=r"is in use: .*0\.1 s; wait .* give another folder"),
        claim.claim(tmp_path),
    ):
        pass
    with claim.claim(tmp_path):
        pass


def test_a_training_that_fails_lets_go(tmp_path):
    with pytest.raises(KeyError), claim.claim(tmp_path):
        raise KeyError
    with claim.claim(tmp_path):
        pass


def test_a_training_that_is_killed_lets_go(tmp_path):
    code = f"""
        import os, pathlib
        from train import claim
        with claim.claim(pathlib.Path({str(tmp_path)!r})):
            os._exit(9)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == 9
    assert (tmp_path / claim.LOCK).exists()
    with claim.claim(tmp_path):
        pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog):
    def acquire(self):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with caplog.at_level(logging.WARNING), claim.claim(tmp_path):
        pass
    assert "would not be noticed" in caplog.text
