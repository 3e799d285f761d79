"""A run's folder belongs to one training at a time."""

import logging
import os
import subprocess
import sys
import textwrap
import threading

import pytest

from train import claim


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(claim, "PATIENCE_S", 0.1)


def test_second_training_is_refused_and_the_next_is_not(tmp_path):
    with (
        claim.claim(tmp_path),
        pytest.raises(ValueError, match=r"in use by another training .* not ended within 0\.1 s"),
        claim.claim(tmp_path),
    ):
        pass
    with claim.claim(tmp_path):
        pass


def test_other_folders_are_free(tmp_path):
    with claim.claim(tmp_path), claim.claim(tmp_path / "other"):
        pass


def test_one_folder_by_two_names(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert claim.lock_file(tmp_path / "link") == claim.lock_file(tmp_path / "run")


def test_waits_for_a_training_that_ends(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(claim, "PATIENCE_S", 60.0)
    begun, end = threading.Event(), threading.Event()

    def first():
        with claim.claim(tmp_path):
            begun.set()
            end.wait()

    training = threading.Thread(target=first)
    training.start()
    begun.wait()
    # It ends once the second has said that it waits.
    handler = logging.Handler()
    handler.emit = lambda record: end.set()
    claim.LOGGER.addHandler(handler)
    try:
        with caplog.at_level(logging.WARNING), claim.claim(tmp_path):
            pass
    finally:
        claim.LOGGER.removeHandler(handler)
    training.join()
    assert "waiting up to 60 s for its end" in caplog.text


def test_a_training_that_fails_lets_go(tmp_path):
    with pytest.raises(KeyError), claim.claim(tmp_path):
        raise KeyError
    with claim.claim(tmp_path):
        pass


def test_a_training_that_is_killed_lets_go(tmp_path):
    code = f"""
        import os, pathlib
        from train import claim
        with claim.claim(pathlib.Path({os.fspath(tmp_path)!r})):
            os._exit(9)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == 9
    assert claim.lock_file(tmp_path).exists()
    with claim.claim(tmp_path):
        pass
