"""The sweep of deleted steps holds up neither the training thread nor the end of a run."""

import shutil
import threading

import pytest
from etils import epath

from emoe_jax import retention
from emoe_jax.retention import DELETED, Sweeper


def delete(folder, step):
    """What the manager does: moves a step to the folder of the deleted ones."""
    (folder / DELETED / str(step)).mkdir(parents=True)


def there(folder):
    return sorted(path.name for path in (folder / DELETED).iterdir())


@pytest.fixture
def stuck(monkeypatch):
    """A disk that deletes nothing before the event is set."""
    go_on, rmtree = threading.Event(), shutil.rmtree

    def slow(folder, **options):
        go_on.wait()
        rmtree(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", slow)
    yield go_on
    go_on.set()


def test_a_sweep_at_work_is_not_waited_for_and_a_later_one_takes_the_rest(tmp_path, stuck):
    sweeper = Sweeper(epath.Path(tmp_path), idle=False)
    delete(tmp_path, 1)
    sweeper.sweep()
    delete(tmp_path, 2)
    sweeper.sweep()  # would never return if it waited
    assert there(tmp_path) == ["1", "2"]
    stuck.set()
    sweeper.close()
    assert not (tmp_path / DELETED).exists()


def test_a_run_ends_while_its_sweep_hangs(tmp_path, stuck, monkeypatch):
    monkeypatch.setattr(retention, "CLOSING_S", 0.01)
    sweeper = Sweeper(epath.Path(tmp_path), idle=False)
    delete(tmp_path, 1)
    before = set(threading.enumerate())
    sweeper.sweep()
    (thread,) = set(threading.enumerate()) - before
    sweeper.close()  # would never return if it waited for its end
    assert thread.daemon
    assert there(tmp_path) == ["1"]
    stuck.set()
    thread.join()
    assert there(tmp_path) == []


def test_an_idle_sweeper_deletes_nothing(tmp_path):
    sweeper = Sweeper(epath.Path(tmp_path), idle=True)
    delete(tmp_path, 1)
    sweeper.sweep()
    sweeper.close()
    assert there(tmp_path) == ["1"]
