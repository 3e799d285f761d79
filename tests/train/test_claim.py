"""A run's folder belongs to one training at a time."""

import errno
import logging
import os
import subprocess
import sys
import tempfile
import textwrap
import threading

import filelock
import pytest

from train import claim


@pytest.fixture(autouse=True)
def impatient(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(claim, "PATIENCE_S", 0.1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("locks")))


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
            end.wait(timeout=60)

    training = threading.Thread(target=first)
    training.start()
    assert begun.wait(timeout=60)
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
    environ = os.environ | {"TMPDIR": tempfile.gettempdir()}
    run = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(run, env=environ, check=False)
    assert done.returncode == 9
    assert claim.lock_file(tmp_path).exists()
    with claim.claim(tmp_path):
        pass


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError()]
)
def test_goes_on_where_no_lock_can_be_had(tmp_path, monkeypatch, caplog, error):
    def acquire(self, **_):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with caplog.at_level(logging.WARNING), claim.claim(tmp_path):
        pass
    assert f"cannot lock {claim.lock_file(tmp_path)}" in caplog.text
