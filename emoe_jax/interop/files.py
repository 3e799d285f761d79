"""Weight files as dicts of numpy arrays: safetensors, files of `torch.save`, the Hugging Face Hub.

Nothing here needs torch, and nothing in a file is run (see `torch_zip`). The network is used in one
case alone: `locate` is given a Hub repository's name.
"""

from __future__ import annotations

import importlib
import os
import pathlib
import re
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from emoe_jax.config import require
from emoe_jax.interop import torch_zip

SAFETENSORS = ".safetensors"
TORCH = (".pth", ".pt", ".bin")
MODEL = "model.safetensors"
CONFIG = "config.json"

# What wrappers put before every name: torch's DataParallel, and the release's class for the Hub.
_PREFIXES = ("module.", "model.")
_ACCEPTED = f"{SAFETENSORS}, {', '.join(TORCH)}"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def read_state(name_or_path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the weights of a model.

    Args:
        name_or_path: a .safetensors file, a .pth, .pt or .bin file of `torch.save`, a folder that
            holds model.safetensors, or a Hub repository's name (see `locate`).

    Returns:
        The arrays by name, C-contiguous. Floating arrays are float32 (float32 in the file: bit for
        bit), others have the file's dtype. If all names begin with "module.", it is taken off;
        then the same for "model.".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has another suffix, is damaged, asks to run something, holds no
            tensors, or holds NaN or infinity.
    """
    path = locate(name_or_path)
    require(
        path.suffix in (SAFETENSORS, *TORCH),
        f"{path} has suffix {path.suffix!r}; files with {_ACCEPTED} are read.",
    )
    state = _read_safetensors(path) if path.suffix == SAFETENSORS else torch_zip.read(path)
    require(bool(state), f"{path} holds no tensors. Save the model's state dict in it.")
    return cleaned(state, str(path))


def cleaned(state: Mapping[str, Any], origin: str = "The state dict") -> dict[str, np.ndarray]:
    """What `read_state` does with the arrays of a file, for arrays that are in memory.

    Args:
        state: arrays by name; anything that `numpy.asarray` takes.
        origin: where they are from, for errors.

    Raises:
        ValueError: NaN or infinity.
    """
    arrays = _strip({name: np.asarray(array) for name, array in state.items()})
    arrays = {name: _as_float32(array) for name, array in arrays.items()}
    _check_finite(arrays, origin)
    return arrays


def locate(name_or_path: str | os.PathLike[str]) -> pathlib.Path:
    """Finds a weight file, or fetches it from the Hugging Face Hub.

    Args:
        name_or_path: a file, or a folder that holds model.safetensors. If there is no such file or
            folder, a string "OWNER/NAME" (one slash, no suffix of a weight file) is the name of a
            Hub repository: its model.safetensors (or only weight file) and config.json are
            downloaded.

    Returns:
        The file. From the Hub, config.json lies beside it.

    Raises:
        FileNotFoundError: there is no such file, or the Hub did not give it.
        ModuleNotFoundError: the name is a Hub repository's and huggingface_hub is not installed.
    """
    path = pathlib.Path(name_or_path)
    if path.is_dir():
        if not (path / MODEL).is_file():
            raise FileNotFoundError(f"The folder {path} has no {MODEL}. Give the file itself.")
        return path / MODEL
    if path.exists():
        return path
    is_hub = isinstance(name_or_path, str) and _HUB_NAME.fullmatch(name_or_path)
    if is_hub and path.suffix not in (SAFETENSORS, *TORCH):
        return _download(str(name_or_path))
    raise FileNotFoundError(
        f"There is no file {path}. Give a file with suffix {_ACCEPTED}, a folder that holds"
        f" {MODEL}, or the name OWNER/NAME of a Hugging Face Hub repository."
    )


def write_safetensors(
    path: str | os.PathLike[str],
    state: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file under another name and renames it: it is there whole or not at all.

    Args:
        path: the file; one that exists is replaced.
        state: arrays by name, of any memory order.
        metadata: text for the file's header.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    path = pathlib.Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"Cannot write {path}: make the folder {path.parent} first.")
    # safetensors writes an array's memory as it lies, whatever the strides.
    arrays = {name: np.asarray(array, order="C") for name, array in state.items()}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        part = pathlib.Path(folder) / path.name
        # safetensors makes files that only their owner can read: give it the usual permissions.
        part.touch()
        mode = part.stat().st_mode
        safetensors.numpy.save_file(arrays, part, dict(metadata) if metadata else None)
        part.chmod(mode)
        os.replace(part, path)


def _download(name: str) -> pathlib.Path:
    """Fetches the weights of a Hub repository, and its config.json, into the Hub's cache.

    The weights are model.safetensors, or the only weight file that there is.
    """
    try:
        hub = importlib.import_module("huggingface_hub")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"There is no file or folder {name}, and to fetch the Hugging Face Hub repository of"
            " that name needs huggingface_hub: pip install 'emoe_jax[hub]'"
        ) from error
    try:
        there = hub.list_repo_files(name)
        weights = [file for file in there if file.endswith((SAFETENSORS, *TORCH))]
        chosen = [MODEL] if MODEL in weights else weights
        require(
            len(chosen) == 1,
            f"The Hugging Face Hub repository {name} has no {MODEL}, and of other weight files:"
            f" {', '.join(weights) or 'none'}. Download the one you want and give the file.",
        )
        if CONFIG in there:
            hub.hf_hub_download(name, CONFIG)
        return pathlib.Path(hub.hf_hub_download(name, chosen[0]))
    except ValueError:
        raise
    # What a missing network, a wrong name or a refused token raise is of several libraries.
    except Exception as error:
        raise FileNotFoundError(
            f"There is no file or folder {name}, and its weights could not be fetched from the"
            f" Hugging Face Hub repository of that name: {error}"
        ) from error


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, with its dtypes."""
    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is no safetensors file, cut short or damaged ({error}). Copy or download it"
            " again."
        ) from error
    # The library looks the dtype up as an attribute of numpy.
    except AttributeError as error:
        raise ValueError(
            f"{path} holds a dtype that cannot be read ({error}). Save it as float32, float16 or"
            " bfloat16."
        ) from error


def _strip(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Takes each of `_PREFIXES` off, in their order, where all names have it."""
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): array for name, array in state.items()}
    return state


def _as_float32(array: np.ndarray) -> np.ndarray:
    """The array, as float32 if it is floating; C-contiguous."""
    if not jax.dtypes.issubdtype(array.dtype, np.floating):
        return np.asarray(array, order="C")
    # float64 beyond float32's range becomes infinity, which the check for finite values reports.
    with np.errstate(over="ignore"):
        return np.asarray(array, np.float32, order="C")


def _check_finite(state: dict[str, np.ndarray], origin: str) -> None:
    """Raises if an array holds NaN or infinity."""
    bad = [name for name, array in state.items() if not np.isfinite(array).all()]
    require(
        not bad,
        f"{origin}: {len(bad)} of {len(state)} tensors hold NaN or infinity (as float32):"
        f" {', '.join(bad[:5])}{', ...' if len(bad) > 5 else ''}. Use a checkpoint from before the"
        " training run diverged.",
    )
