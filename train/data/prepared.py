"""Datasets that tensorflow-datasets has prepared on disk, opened without tensorflow or network.

A prepared dataset is a folder DIR/NAME[/CONFIG]/VERSION that holds dataset_info.json,
features.json and array_record files. Only that folder is read: the code that downloads and builds
a dataset is never imported, so a missing dataset is an error at once and not a download.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

from etils import epath

_NAME = re.compile(r"(?P<name>\w+)(?:/(?P<config>[\w.\-]+))?(?::(?P<version>\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_HELDOUT_SPLITS = ("validation", "valid", "val", "test")


def open_prepared(name: str, tfds_dir: str) -> Any:
    """Opens a prepared dataset.

    Args:
        name: "NAME", "NAME/CONFIG", each with or without ":VERSION"; without one the newest
            prepared version is taken.
        tfds_dir: Folder of prepared datasets, local or gs://; empty: $TFDS_DATA_DIR or
            ~/tensorflow_datasets.

    Returns:
        A read-only `tfds.core.DatasetBuilder`.

    Raises:
        ValueError: If the name is malformed.
        FileNotFoundError: If the dataset is not prepared in the folder.
        ModuleNotFoundError: If tensorflow-datasets is not installed.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"tfds name {name!r} is not of the form NAME[/CONFIG][:MAJOR.MINOR.PATCH]")
    try:
        import tensorflow_datasets as tfds
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"source 'tfds:{name}' needs {error.name}, which is not installed; run "
            "`pip install tensorflow-datasets importlib_resources`"
        ) from error
    directory = tfds_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = epath.Path(directory).expanduser()
    folder = root / match["name"]
    if match["config"]:
        folder /= match["config"]
    versions = _prepared_versions(folder)
    wanted = match["version"] or (versions[-1] if versions else "")
    if wanted not in versions:
        raise FileNotFoundError(_missing(name, folder, versions, root))
    return tfds.builder_from_directory(folder / wanted)


def _prepared_versions(folder: epath.Path) -> list[str]:
    """Returns the prepared versions in a dataset's folder, oldest first."""
    if not folder.is_dir():
        return []
    names = [
        path.name
        for path in folder.iterdir()
        if _VERSION.fullmatch(path.name) and (path / "features.json").exists()
    ]
    return sorted(names, key=lambda name: tuple(map(int, name.split("."))))


def _missing(name: str, folder: epath.Path, versions: Sequence[str], root: epath.Path) -> str:
    """Words the error for a dataset that is not there."""
    found = f"; versions there: {', '.join(versions)}" if versions else ""
    if folder.is_dir() and not versions:
        configs = sorted(path.name for path in folder.iterdir() if _prepared_versions(path))
        found = f"; configs there: {', '.join(configs)}" if configs else ""
    build_name = name.partition(":")[0]
    return (
        f"tfds dataset {name!r} is not prepared: looked in {folder}{found}. Prepare it on a "
        "machine with a network and tensorflow (`pip install -e '.[tfds]'`): "
        f"`tfds build {build_name} --data_dir={root} --file_format=array_record`, or point "
        "data.tfds_dir or $TFDS_DATA_DIR at the folder that holds it"
    )


def open_split(builder: Any, split: str, *, decoders: Any = None) -> Sequence[Any]:
    """Opens one split of a prepared dataset for random access.

    Args:
        builder: What `open_prepared` returned.
        split: Name of a split.
        decoders: As in `tfds.core.DatasetBuilder.as_data_source`.

    Returns:
        A sequence of examples (dicts); nothing is read before it is indexed.

    Raises:
        ValueError: If there is no such split, or its files cannot be read in random order.
    """
    if split not in builder.info.splits:
        raise ValueError(
            f"tfds dataset {builder.info.full_name} has no split {split!r}; "
            f"it has {', '.join(sorted(builder.info.splits))}"
        )
    try:
        return builder.as_data_source(split=split, decoders=decoders)
    except NotImplementedError as error:
        raise ValueError(
            f"tfds dataset in {builder.data_dir} cannot be read in random order (its files are "
            "not array_record); prepare it again into another folder with "
            "`tfds build ... --file_format=array_record`"
        ) from error


def heldout_split(builder: Any, requested: str, train_split: str) -> str:
    """Names the split to hold out, or "" where the dataset has none.

    Args:
        builder: What `open_prepared` returned.
        requested: The split that the configuration asks for; empty: the first of validation,
            valid, val and test that exists and is not the training split.
        train_split: The split to train on.

    Returns:
        A split's name, or "".

    Raises:
        ValueError: If the requested split is the training split.
    """
    if requested and requested == train_split:
        raise ValueError(
            f"the held-out split {requested!r} is also the training split; name another, or leave "
            "it empty"
        )
    if requested:
        return requested
    names = [s for s in _HELDOUT_SPLITS if s in builder.info.splits and s != train_split]
    return names[0] if names else ""
