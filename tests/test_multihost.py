"""Texts between processes; several of them are in test_checkpoint.py and train/test_cluster.py."""

import jax
import numpy as np
import pytest

from emoe_jax import multihost


def test_one_process_hears_itself():
    assert multihost.gather_texts("text") == ["text"]


@pytest.mark.parametrize("texts", [["", ""], ["a", "größer"], ["x" * 1024, "y" * 1025]])
def test_texts_of_any_length_come_back_whole(monkeypatch, texts):
    """Two processes, the second of which is played."""
    other = np.frombuffer(texts[1].encode(), np.uint8)
    lengths = []

    def allgather(array):
        lengths.append(array.size)
        if array.dtype == np.int32:
            return np.stack([array, np.array([other.size], np.int32)])
        padded = np.zeros_like(array)
        padded[: other.size] = other
        return np.stack([array, padded])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost.multihost_utils, "process_allgather", allgather)
    assert multihost.gather_texts(texts[0]) == texts
    assert lengths == [1, 2048 if len(texts[0]) > 1000 else 1024]
