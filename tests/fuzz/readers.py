"""Everything that reads what a user hands in: small valid inputs, how they are damaged, how read.

An exception that a reader documents is no defect; which these are stands with each.
"""

import contextlib
import dataclasses
import functools
import gzip
import io
import json
import pathlib
import struct
import sys
import tempfile
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
from absl import flags
from flax import nnx
from ml_collections import config_flags
from PIL import Image

from emoe_jax import interop, pure
from emoe_jax.checkpoint import CheckpointError, CheckpointMismatch, Checkpoints
from emoe_jax.config import BasisConfig, MoEConfig, ViTConfig
from emoe_jax.interop import config_json, released, vit
from emoe_jax.models import EMoEViT
from tests.fuzz import mutate
from tests.fuzz.mutate import Input
from tests.fuzz.reader import Reader
from tests.train.tiny import lm_tree, vit_tree
from train import cli, outcome, report, variants
from train.config import experiment, flat_keys, freeze, replaced, to_json
from train.data import images, sources
from train.data.config import TextConfig, VisionConfig
from train.data.text import load_text
from train.data.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from train.run import CONFIG_FILE, MODEL_FILE, build, read_config, read_model_config

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENTS = [f"{n} shall not perish — {n * 'é '}from the earth\n" for n in range(5)]


def _files(folder: pathlib.Path) -> Input:
    """The content of a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def _json(tree: Any) -> bytes:
    return json.dumps(tree, indent=1).encode()


BYTES = {"": mutate.damage_bytes}
JSON = {".json": mutate.damage_json}


# ----------------------------------------------------------------------------------------- text


def _texts() -> Sequence[Input]:
    names = ("a.txt", "b.txt", "c.md", "d.txt")
    return [{name: text.encode() for name, text in zip(names, DOCUMENTS, strict=False)}]


def _jsonl() -> Sequence[Input]:
    lines = [json.dumps({"text": text, "id": n}) for n, text in enumerate(DOCUMENTS)]
    return [
        {"a.jsonl": "\n".join(lines).encode()},
        {"a.jsonl": b"\n\n".join(map(str.encode, lines))},
    ]


def _parquet() -> Sequence[Input]:
    texts = DOCUMENTS * 3
    columns = {"text": texts, "id": list(range(len(texts))), "tags": [["a"], []] * 7 + [None]}
    table = pyarrow.table(columns)
    large = table.set_column(0, "text", pyarrow.array(texts, pyarrow.large_string()))
    forms: list[tuple[pyarrow.Table, dict[str, Any]]] = [
        (table, {}),
        (table, {"compression": "zstd", "use_dictionary": False, "row_group_size": 4}),
        (large, {"compression": "gzip", "data_page_version": "2.0"}),
        (table, {"compression": "none", "write_page_checksum": True}),
    ]
    inputs = []
    for form, options in forms:
        file = io.BytesIO()
        pyarrow.parquet.write_table(form, file, **options)
        inputs.append({"a.parquet": file.getvalue()})
    return inputs


def _read_documents(folder: pathlib.Path) -> None:
    config = TextConfig(sources=("files:*.*",), heldout_every=2)
    documents = sources.load_documents("files:*.*", config)
    for text in (*documents.train, *documents.heldout):
        text.encode("utf-8")


def _run_texts() -> Sequence[Input]:
    """A run's texts, tokenizer and record of its split."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for number, text in enumerate(DOCUMENTS):
            (folder / f"{number}.txt").write_text(text, encoding="utf-8")
        with contextlib.chdir(folder):
            _read_run_texts(folder)
        return [_files(folder)]


def _read_run_texts(folder: pathlib.Path) -> None:
    config = TextConfig(("files:*.txt",), (1.0,), "bytes", heldout_every=2, sequence_length=16)
    data = load_text(config, tokenizer_path=folder / "tokenizer.json")
    for _ in data.heldout_batches(2):
        pass


def _tokenizers() -> Sequence[Input]:
    made = []
    with tempfile.TemporaryDirectory() as name:
        file = pathlib.Path(name) / "tokenizer.json"
        for tokenizer in (byte_tokenizer(), train_bpe(DOCUMENTS, 270)):
            tokenizer.save(file)
            made.append({"tokenizer.json": file.read_bytes()})
    # As others write it: a pattern, then bytes; a template of special tokens; truncation.
    tree = json.loads(made[-1]["tokenizer.json"])
    pattern = r"\p{L}+| ?\d{1,3}| ?[^\s\p{L}\d]+|\s+"
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    parts = [split, {**tree["pre_tokenizer"], "use_regex": False}]
    tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    tree["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "direction": "Right"} | {
        "stride": 0
    }
    special = {"<|bos|>": {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]}}
    piece = {"Sequence": {"id": "A", "type_id": 0}}
    single = [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, piece]
    tree["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single + [piece],
    }
    tree["post_processor"]["special_tokens"] = special
    return [*made, {"tokenizer.json": _json(tree)}]


def _read_tokenizer(folder: pathlib.Path) -> None:
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    for text in DOCUMENTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


# --------------------------------------------------------------------------------------- images


def _idx() -> Sequence[Input]:
    draw = np.random.default_rng(0)
    files = {}
    for prefix, count in (("train", 6), ("t10k", 3)):
        pixels = draw.integers(0, 256, (count, 4, 4), np.uint8)
        head = struct.pack(">BBBBIII", 0, 0, 8, 3, count, 4, 4)
        files[f"{prefix}-images-idx3-ubyte"] = head + pixels.tobytes()
        labels = struct.pack(">BBBBI", 0, 0, 8, 1, count) + bytes(range(count))
        files[f"{prefix}-labels-idx1-ubyte"] = labels
    packed = {f"{name}.gz": gzip.compress(data, mtime=0) for name, data in files.items()}
    return [files, packed]


def _read_idx(folder: pathlib.Path) -> None:
    config = VisionConfig(source="fashion_mnist", image_size=4, data_dir=str(folder))
    source = images.load_images(config)
    source.train.read(np.arange(len(source.train)))


def _pictures() -> Sequence[Input]:
    draw = np.random.default_rng(0)
    inputs = []
    for mode, form in (
        *(("RGB", "PNG"), ("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("I;16", "PNG")),
        *(("RGB", "JPEG"), ("L", "JPEG"), ("P", "GIF"), ("RGB", "BMP"), ("RGB", "WEBP")),
    ):
        shape = (9, 12) if mode in ("L", "P", "I;16") else (9, 12, len(mode))
        pixels = draw.integers(0, 256, shape)
        image = Image.fromarray(pixels.astype(np.uint16 if mode == "I;16" else np.uint8))
        file = io.BytesIO()
        (image.convert("P") if mode == "P" else image).save(file, form)
        inputs.append({"picture": file.getvalue()})
    return inputs


def _read_picture(folder: pathlib.Path) -> None:
    config = VisionConfig(source="tfds:pictures", image_size=8, channels=3, resize=True)
    examples = [{"image": (folder / "picture").read_bytes(), "label": 1}]
    images.PreparedImages(examples, np.array([0]), config).read(np.array([0]))


# -------------------------------------------------------------------------------------- weights


def _tiny_vit(router: str) -> EMoEViT:
    moe = MoEConfig(
        router="eigen",
        experts=2,
        hidden=4,
        activation="gelu",
        basis=BasisConfig(4, "retraction", companion=True),
    )
    adapter = {"moe_form": "adapter", "moe_every": 2, "moe": moe} if router else {"moe_every": 0}
    sizes: dict[str, Any] = {"image_size": 8, "width": 8, "depth": 2, "heads": 2, "mlp_hidden": 16}
    return EMoEViT(ViTConfig(**sizes | adapter, pooling="class", channels=1), rngs=nnx.Rngs(0))


def _weights() -> Sequence[Input]:
    inputs = []
    for router in ("eigen", ""):
        model = _tiny_vit(router)
        state = interop.export_emoe(model) if router else interop.export_vit(model)
        with tempfile.TemporaryDirectory() as name:
            file = pathlib.Path(name) / "model.safetensors"
            interop.write_safetensors(file, state, {"format": "pt"})
            described = _json(interop.describe(model))
            inputs.append({"model.safetensors": file.read_bytes(), "config.json": described})
    return inputs


def _read_weights(folder: pathlib.Path) -> None:
    interop.load(folder, {})


def _read_initial(folder: pathlib.Path) -> None:
    model = _tiny_vit("eigen")
    _, params, _ = pure.split(model)
    interop.initial_params(folder, model.config, params)


def _safetensors() -> Sequence[Input]:
    arrays = {"model.w": np.arange(6, dtype=np.float32).reshape(2, 3), "model.n": np.array([1, 2])}
    arrays["model.h"] = np.ones(3, np.float16)
    with tempfile.TemporaryDirectory() as name:
        file = pathlib.Path(name) / "a.safetensors"
        interop.write_safetensors(file, arrays, {"format": "pt"})
        return [{"weights.safetensors": file.read_bytes()}]


def _torch() -> Sequence[Input]:
    kept = ROOT / "tests" / "data" / "torch"
    return [
        {"weights.pth": (kept / name).read_bytes()} for name in ("checkpoint.pt", "every_kind.pth")
    ]


def _fact_words() -> Collection[str]:
    return (*vit.FACTS, *released.DEFAULTS, "vit.", "blocks.", "branches.", "branch")


# ---------------------------------------------------------------------------------- checkpoints


def _checkpoints() -> Sequence[Input]:
    state = {"params": {"w": jax.numpy.arange(12.0).reshape(4, 3), "b": jax.numpy.ones(2)}}
    with tempfile.TemporaryDirectory() as name:
        with Checkpoints(name, every=1) as checkpoints:
            for step in (1, 2):
                score = {"eval/loss": 1.0 / step}
                checkpoints.save(step, state, data_state={"0": {}}, meta={"a": 1}, metrics=score)
        return [_files(pathlib.Path(name))]


def _read_checkpoints(folder: pathlib.Path) -> None:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {"w": (4, 3), "b": (2,)}
    wanted = {
        "params": {
            name: jax.ShapeDtypeStruct(shape, np.float32, sharding=here)
            for name, shape in shapes.items()
        }
    }
    with Checkpoints(folder, every=1, read_only=True) as checkpoints:
        checkpoints.best_step()
        step = checkpoints.latest_step()
        if step is None:
            raise FileNotFoundError("checkpoint")
        restored = checkpoints.restore(step, wanted)
    assert float(restored.train_state["params"]["w"].sum()) == 66


# ------------------------------------------------------------------------------- configurations


@functools.cache
def _keys(task: str) -> list[str]:
    # The folder that a user wants written is not tried.
    return [key for key in flat_keys(experiment(task)) if key != "data.cache_dir"]


@functools.cache
def _config_words() -> Collection[str]:
    names = {part for task in ("lm", "vit") for key in _keys(task) for part in key.split(".")}
    return {*names, "--config", "config key", "mesh"} - {"data", "model"}


def _command_lines() -> Sequence[Input]:
    files = {f"{n}.txt": text.encode() for n, text in enumerate(DOCUMENTS)}
    lm = ["train", f"--config={ROOT}/configs/lm_tiny.py", "--config.data.sources=('files:*.txt',)"]
    lines = [lm, ["train", f"--config={ROOT}/configs/vit_digits.py"]]
    return [files | {"argv.json": _json(line)} for line in lines]


def _damage_command_line(draw: Any, data: bytes, others: Sequence[bytes]) -> bytes:
    task = "lm" if b"lm_tiny" in data else "vit"
    return mutate.damage_arguments(_keys(task), "--config.{}={}")(draw, data, others)


def _read_command_line(folder: pathlib.Path) -> None:
    """What `python -m train` does before it compiles."""
    argv = json.loads((folder / "argv.json").read_bytes())
    said = io.StringIO()
    sys.argv, flags.FLAGS = argv, flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", lock_config=True, flag_values=flags.FLAGS)
    try:
        with contextlib.redirect_stderr(said):
            cli._parse(argv)
    except SystemExit as end:
        raise ValueError(said.getvalue()) from end
    build(freeze(flags.FLAGS.config), folder / "run")


def _run_folders() -> Sequence[Input]:
    trees = [lm_tree("files:*.txt"), vit_tree()]
    return [{CONFIG_FILE: to_json(tree).encode()} for tree in trees]


def _read_run_folder(folder: pathlib.Path) -> None:
    freeze(read_config(folder / CONFIG_FILE))


def _model_folders() -> Sequence[Input]:
    described = dataclasses.asdict(_tiny_vit("eigen").config)
    return [{MODEL_FILE: to_json(described).encode()}]


def _overrides() -> Sequence[Input]:
    return [{"argv.json": b"[]", CONFIG_FILE: to_json(vit_tree()).encode()}]


def _read_overrides(folder: pathlib.Path) -> None:
    """What `python -m train.evaluate --override` does before it reads data."""
    texts = json.loads((folder / "argv.json").read_bytes())
    freeze(replaced(read_config(folder / CONFIG_FILE), cli.overrides(texts)))


def _variants() -> Sequence[Input]:
    tree = {
        "no_offset": {"router": "whitened", "moe.routing.offset": False, "moe.top_k": 1},
        "hot": {"router": "softmax", "moe.routing.temperature": 2.0, "tried": [{"loss": 1}]},
        "hotter": {"like": "hot", "moe.routing.temperature": 3.0},
    }
    return [{"options.json": _json(tree)}]


def _read_variants(folder: pathlib.Path) -> None:
    options = variants.read_options([str(folder / "options.json")])
    for name in options:
        (variant,) = variants.choose([name], options)
        variants.check(variants.variant_tree(vit_tree(), variant, 1))


# --------------------------------------------------------------------------------- what runs left


def _logs() -> Sequence[Input]:
    metrics = [{"step": n, "train/loss": 1.5, "router/layer_01/max_vio": "NaN"} for n in (1, 2)]
    routing = [{"step": n, "layer_01": {"load": [0.5, 0.5]}} for n in (1, 2)]
    return [
        {
            name: "".join(json.dumps(line) + "\n" for line in lines).encode()
            for name, lines in (("metrics.jsonl", metrics), ("routing.jsonl", routing))
        }
    ]


def _results() -> Sequence[Input]:
    return [{"result.json": _json({"variant": "a", "metrics": {"loss": 1.5, "dead": None}})}]


def _read_result(folder: pathlib.Path) -> None:
    outcome.read_result(folder / "result.json", measured=False)


def _studies() -> Sequence[Input]:
    row = {"table": "runs", "variant": "a", "seed": 3, "router": "eigen", "options": {}}
    row |= {"config": {"task": "lm"}, "initial_weights": "b0", "made_by": {"device": "cpu"}}
    metrics = {"loss": 1.5, "dead": None, "max_vio": 1.0, "batch_max_vio_floor": 0.1}
    numbers = {"load": {"layer_00": [0.5, 0.5]}, "batch_max_vio": [[1, 2], [0.5, 0.25]]}
    rows = [row | numbers | {"metrics": metrics}]
    return [{"study.json": _json({"rows": rows, "run": {"command": "x"}})}]


def _read_study(folder: pathlib.Path) -> None:
    report.read_study(str(folder / "study.json"))
    outcome.read_results(str(folder / "study.json"))


# ---------------------------------------------------------------------------------------- table

READERS = {
    "txt": Reader(40, _texts, BYTES, _read_documents),
    "jsonl": Reader(80, _jsonl, {"": mutate.damage_lines}, _read_documents),
    "parquet": Reader(80, _parquet, BYTES, _read_documents),
    "idx": Reader(
        70,
        _idx,
        {"": mutate.damage_gzip},
        _read_idx,
        (ValueError, FileNotFoundError),
        lambda: ("data.classes", "data.image_size", "-idx"),
    ),
    "image": Reader(
        100,
        _pictures,
        {"": mutate.damage_png},
        _read_picture,
        words=lambda: ("example 0",),
        # The largest image that is read, four bytes a pixel, and its conversion.
        peak=2 * 4 * 90_000_000,
    ),
    "tokenizer": Reader(80, _tokenizers, JSON, _read_tokenizer),
    "run_texts": Reader(40, _run_texts, JSON | BYTES, _read_run_texts, words=lambda: ("files:",)),
    "safetensors": Reader(
        80,
        _safetensors,
        {"": mutate.damage_safetensors},
        lambda folder: interop.read_state(folder / "weights.safetensors"),
    ),
    "torch": Reader(
        100,
        _torch,
        {"": mutate.damage_zip},
        lambda folder: interop.read_state(folder / "weights.pth"),
    ),
    "weights": Reader(
        40,
        _weights,
        JSON | {"": mutate.damage_safetensors},
        _read_weights,
        (ValueError, FileNotFoundError),
        _fact_words,
    ),
    "initial": Reader(
        20,
        _weights,
        JSON | {"": mutate.damage_safetensors},
        _read_initial,
        (ValueError, FileNotFoundError),
        _fact_words,
    ),
    "release": Reader(
        20,
        lambda: [{"config.json": files["config.json"]} for files in _weights()],
        JSON,
        lambda folder: config_json.read(folder / "config.json"),
    ),
    "checkpoint": Reader(
        60,
        _checkpoints,
        {"": mutate.damage_json},
        _read_checkpoints,
        (ValueError, FileNotFoundError, CheckpointError, CheckpointMismatch),
        lambda: ("checkpoint", "Step"),
    ),
    "argv": Reader(
        70,
        _command_lines,
        {"argv.json": _damage_command_line},
        _read_command_line,
        (ValueError, FileNotFoundError, ModuleNotFoundError),
        lambda: (*_config_words(), "command line flag"),
    ),
    "config": Reader(40, _run_folders, JSON, _read_run_folder, words=_config_words),
    "model": Reader(
        20, _model_folders, JSON, lambda folder: read_model_config(folder), words=_config_words
    ),
    "overrides": Reader(
        30,
        _overrides,
        {"argv.json": lambda *case: mutate.damage_arguments(_keys("vit"), "{}={}")(*case)},
        _read_overrides,
        words=lambda: (*_config_words(), "--override"),
    ),
    "variants": Reader(
        20, _variants, JSON, _read_variants, words=lambda: (*_config_words(), "variant")
    ),
    "logs": Reader(
        10, _logs, {"": mutate.damage_lines}, report.read_logs, (ValueError, FileNotFoundError)
    ),
    "result": Reader(
        10,
        _results,
        JSON,
        lambda folder: outcome.read_result(folder / "result.json", measured=False),
    ),
    "study": Reader(10, _studies, JSON, _read_study),
}
