"""Writes a tiny prepared tfds dataset without tensorflow, laid out as the real builders do.

The layout was compared with what a builder's `download_and_prepare` writes with tensorflow-datasets
4.9.10, tensorflow-cpu 2.21.0 and file_format="array_record": one folder NAME/VERSION with
dataset_info.json, features.json and NAME-SPLIT.array_record-00000-of-00001, whose records are
serialised tf.train.Example messages.
"""

import json
import pathlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2


def write_prepared(
    root: pathlib.Path,
    name: str,
    features: dict[str, Any],
    splits: dict[str, list[dict[str, Any]]],
    *,
    version: str = "1.0.0",
) -> pathlib.Path:
    """Writes one dataset.

    Args:
        root: Folder of prepared datasets.
        name: "NAME" or "NAME/CONFIG".
        features: tfds features by name.
        splits: For each split its examples; values are bytes (text, encoded images) or ints.
        version: Version.

    Returns:
        The dataset's folder.
    """
    folder = root / name / version
    folder.mkdir(parents=True)
    tfds.features.FeaturesDict(features).save_config(folder)
    base, _, config = name.partition("/")
    infos = []
    for split, examples in splits.items():
        records = [_serialise(example) for example in examples]
        writer = array_record_module.ArrayRecordWriter(
            str(folder / f"{base}-{split}.array_record-00000-of-00001"), "group_size:1"
        )
        for record in records:
            writer.write(record)
        writer.close()
        infos.append(
            {
                "name": split,
                "shardLengths": [str(len(records))],
                "numBytes": str(sum(map(len, records))),
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    info = {"name": base, "version": version, "fileFormat": "array_record", "splits": infos}
    if config:
        info["configName"] = config
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def _serialise(example: dict[str, Any]) -> bytes:
    message = tf_example_pb2.Example()
    for key, value in example.items():
        feature = message.features.feature[key]
        if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        else:
            feature.int64_list.value.append(int(np.asarray(value)))
    return message.SerializeToString()
