"""What every program needs of an experiment: data, mesh, model, optimizer, shardings, steps.

Everything derives from one abstract tree: no array exists until `init` or a restore makes it where
it shall live.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, serialization
from jax.sharding import Mesh

from emoe_jax import grouped, json_file, pure, sharding
from emoe_jax.checkpoint import Checkpoints
from emoe_jax.config import LMConfig, ViTConfig, moe_layers, require
from emoe_jax.models import EMoELM, EMoEViT
from emoe_jax.multihost import gather_texts
from emoe_jax.optim import make_optimizer, partition
from train import cluster
from train.config import (
    ExperimentConfig,
    filled,
    freeze,
    model_from_tree,
    replaced,
    to_json,
    with_vocab,
)
from train.data.config import TextConfig
from train.data.text import TextData, load_text
from train.data.vision import VisionData, load_vision
from train.step import Steps, make_steps

Tree = Any

CONFIG_FILE = "config.json"
MODEL_FILE = "model.json"
TOKENIZER_FILE = "tokenizer.json"
CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run; `build` makes them.

    Attributes:
        config: the experiment, the model's vocabulary known.
        data: text or images.
        mesh: of all devices.
        model: the model without its arrays.
        abstract: the training state as `jax.ShapeDtypeStruct` with shardings.
        steps: one training and one evaluation step.
        init: makes the training state from nothing, on its shardings; a `jax.jit`.
    """

    config: ExperimentConfig
    data: TextData | VisionData
    mesh: Mesh
    model: pure.Pure
    abstract: Tree
    steps: Steps
    init: Any

    @property
    def unit(self) -> str:
        """What the rate counts."""
        return "tokens" if isinstance(self.data, TextData) else "images"

    @property
    def units_per_step(self) -> int:
        """Tokens (padding included) or images in a batch."""
        if isinstance(self.data, TextData):
            return self.config.batch * self.data.config.sequence_length
        return self.config.batch

    @property
    def eval_batch(self) -> int:
        """Rows of an evaluation batch: those of a microbatch."""
        return self.config.batch // self.config.accumulate

    def key(self) -> jax.Array:
        """The key of routers' random choices."""
        return jax.random.key(self.config.seed)

    def rows(self, batch: int) -> np.ndarray:
        """Rows of a global batch that this process gives to its devices, ascending."""
        return sharding.rows_here(self.mesh, batch)

    def abstract_batch(self, example: Mapping[str, np.ndarray], size: int) -> Tree:
        """Abstract global batch of `size` rows, of the shapes of this process's part of one."""
        where = sharding.batch_sharding(self.mesh)

        def place(leaf: np.ndarray) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype, sharding=where)

        return {name: place(leaf) for name, leaf in self.with_rows(example, size).items()}

    def to_devices(self, batch: Mapping[str, np.ndarray], size: int) -> Tree:
        """The global batch of `size` rows on the mesh, from this process's part of it."""
        where, rows = sharding.batch_sharding(self.mesh), self.rows(size)

        def place(leaf: np.ndarray) -> jax.Array:
            def shard(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                first, last, _ = index[0].indices(size)
                return leaf[slice(*np.searchsorted(rows, (first, last)))]

            return jax.make_array_from_callback((size, *leaf.shape[1:]), where, shard)

        return {name: place(leaf) for name, leaf in self.with_rows(batch, size).items()}

    def with_rows(self, batch: Mapping[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
        """This process's part of a batch and `rows` [B], its rows in the global batch.

        Raises:
            ValueError: an id that the model's vocabulary does not have, which an accelerator would
                silently take for another; or not the rows that this process's devices hold.
        """
        if isinstance(self.config.model, LMConfig):
            _check_ids(batch, self.config.model.vocab_size)
        rows, given = self.rows(size), next(iter(batch.values())).shape[0]
        require(
            given == len(rows),
            f"got {given} rows of a batch of {size}; this process's devices hold {len(rows)}",
        )
        return dict(batch) | {"rows": rows.astype(np.int32)}


def _check_ids(batch: Mapping[str, np.ndarray], vocab_size: int) -> None:
    """Refuses ids outside [0, vocab_size)."""
    for name in ("tokens", "targets"):
        for outside in (int(batch[name].min()), int(batch[name].max())):
            require(
                0 <= outside < vocab_size,
                f"{name} hold id {outside}, but the model's vocabulary has {vocab_size} ids, 0 to"
                f" {vocab_size - 1}; use the run's own tokenizer",
            )


def build(config: ExperimentConfig, workdir: pathlib.Path) -> Run:
    """Builds the parts of a run, with every check that needs no compilation.

    Args:
        config: the experiment.
        workdir: the run's folder; a language model's tokenizer is kept there.

    Raises:
        ValueError: the mesh or the batch does not fit, or the data are bad.
        FileNotFoundError: data are missing.
    """
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(mesh, config.batch, config.accumulate)
    # What only the model's parts can judge (the router's name and options, the names of what is
    # trained) before data are read.
    _, params, _ = pure.abstract_split(model_maker(config.model, config.seed))
    partition(params, config.optim.trainable)
    if config.model.moe.dispatch != "dense" and any(moe_layers(config.model)):
        grouped.prepare()
    data: TextData | VisionData
    if isinstance(config.data, TextConfig):
        data = load_text(config.data, tokenizer_path=workdir / TOKENIZER_FILE)
        config = with_vocab(config, data.tokenizer.vocab_size)
    else:
        data = load_vision(config.data)
    program = make_program(config, mesh)
    return Run(config, data, mesh, *program)


class Program(NamedTuple):
    """What a configuration is on a mesh, whose devices need not be there.

    Attributes:
        model: as in `Run`, likewise the others.
        abstract: the training state.
        steps: the functions.
        init: makes the training state.
    """

    model: pure.Pure
    abstract: Tree
    steps: Steps
    init: Any


def make_program(config: ExperimentConfig, mesh: Mesh) -> Program:
    """Model, abstract state, steps and initialiser, without data and without arrays.

    Args:
        config: the experiment, the model's vocabulary known.
        mesh: its shardings derive from.

    Raises:
        ValueError: the mesh does not divide the model.
    """
    optimizer = make_optimizer(config.optim, config.steps, config.model.moe.basis.method)
    model, params, _ = pure.abstract_split(model_maker(config.model, config.seed))
    trained, _ = partition(params, config.optim.trainable)
    opt_state = jax.eval_shape(optimizer.init, trained)
    init = _initializer(config, optimizer)
    abstract = jax.eval_shape(init)
    places = sharding.shardings(mesh, abstract)
    abstract = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract,
        places,
    )
    steps = make_steps(config, mesh, model, optimizer, opt_state)
    return Program(model, abstract, steps, jax.jit(init, out_shardings=places))


def model_maker(config: LMConfig | ViTConfig, seed: int) -> Callable[[], nnx.Module]:
    """A function that builds the model of a configuration."""

    def make() -> nnx.Module:
        rngs = nnx.Rngs(params=seed)
        if isinstance(config, LMConfig):
            return EMoELM(config, rngs=rngs)
        return EMoEViT(config, rngs=rngs)

    return make


def _initializer(
    config: ExperimentConfig, optimizer: optax.GradientTransformation
) -> Callable[[], Tree]:
    build_model = pure.initializer(model_maker(config.model, config.seed))

    def init() -> Tree:
        params, router = build_model()
        trained, _ = partition(params, config.optim.trainable)
        return {
            "step": jnp.zeros((), jnp.int32),
            "params": params,
            "router": router,
            "opt": serialization.to_state_dict(optimizer.init(trained)),
        }

    return init


def open_checkpoints(run: Run, workdir: pathlib.Path) -> Checkpoints:
    """The checkpoints of a run that trains."""
    keep = run.config.checkpoint
    return Checkpoints(
        workdir / CHECKPOINTS,
        every=keep.every,
        keep_last=keep.keep_last,
        keep_every=keep.keep_every,
        keep_best=keep.keep_best,
        best_metric="eval/loss",
    )


def read_config(file: pathlib.Path) -> dict[str, Any]:
    """The keys in a config.json, and the defaults of those that are younger than it.

    Raises:
        ValueError: the file is damaged: no JSON object, or one with objects in other places.
    """
    return filled(read_json(file))


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object in a file of a run's folder.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return json_file.read_object(file)
    except ValueError as error:
        raise ValueError(
            f"{error}; delete it and start the training again, which writes it anew and goes on"
            " from the last checkpoint"
        ) from error


def choose_step(checkpoints: Checkpoints, which: str) -> int:
    """The step that "newest", "best" or a number names.

    Raises:
        ValueError: it names none of these.
        FileNotFoundError: there is no such checkpoint yet.
    """
    if which.isdigit():
        return int(which)
    require(which in ("newest", "best"), f"step={which!r} must be newest, best or a number")
    step = checkpoints.best_step() if which == "best" else checkpoints.latest_step()
    if step is None:
        missing = "checkpoint of an evaluated step" if which == "best" else "finished checkpoint"
        raise FileNotFoundError(f"{checkpoints.directory} holds no {missing} yet")
    return step


def load_trained(
    workdir: pathlib.Path, overrides: Mapping[str, Any], which: str = "newest"
) -> tuple[Run, Tree, int]:
    """A finished or interrupted run, with the parameters of a checkpoint.

    Args:
        workdir: the run's folder.
        overrides: dotted keys of the experiment to be replaced, such as "mesh.fsdp" where there are
            other devices than in training.
        which: the checkpoint: "newest", "best" (lowest held-out loss) or its step.

    Returns:
        The run; `params` and `router`; the step of the checkpoint.

    Raises:
        FileNotFoundError: the folder holds no run, or no checkpoint yet.
        ValueError: an override is unknown, or does not fit.
    """
    cluster.check_same({"override": overrides, "step": which})
    run = cluster.together(lambda: _build_trained(workdir, overrides))
    wanted = {name: run.abstract[name] for name in ("params", "router")}
    with Checkpoints(workdir / CHECKPOINTS, every=1, read_only=True) as checkpoints:
        # A run that goes on may have saved between two looks: all take what the first one sees.
        step = int(gather_texts(str(choose_step(checkpoints, which)))[0])
        restored = checkpoints.restore(step, wanted, partial=True)
    return run, {"router": {}} | restored.train_state, step


def _build_trained(workdir: pathlib.Path, overrides: Mapping[str, Any]) -> Run:
    """The parts of the run in a folder."""
    return build(freeze(replaced(read_run_config(workdir), overrides)), workdir)


def read_run_config(workdir: pathlib.Path) -> dict[str, Any]:
    """The keys of the run in a folder, see `read_config`.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: its file is damaged.
    """
    file = workdir / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"--workdir={workdir} holds no run: there is no {CONFIG_FILE}; train one there with"
            f" python -m train --config=configs/NAME.py --workdir={workdir}"
        )
    return read_config(file)


def is_saved_model(folder: pathlib.Path) -> bool:
    """Whether a folder is that of a run, or one that `save_model` wrote."""
    named = any((folder / name).is_file() for name in (CONFIG_FILE, MODEL_FILE))
    return named and (folder / CHECKPOINTS).is_dir()


def save_model(folder: pathlib.Path, model: EMoEViT) -> None:
    """Writes a model that no run of ours has made: its configuration and one checkpoint.

    Raises:
        CheckpointError: it could not be written.
    """
    _, params, router = pure.split(model)
    folder.mkdir(parents=True, exist_ok=True)
    with Checkpoints(folder / CHECKPOINTS, every=1) as checkpoints:
        state = {"params": params} | ({"router": router} if router else {})
        checkpoints.save(0, state, data_state={}, meta={}, force=True)
    (folder / MODEL_FILE).write_text(to_json(dataclasses.asdict(model.config)), encoding="utf-8")


def read_model_config(folder: pathlib.Path) -> ViTConfig:
    """The configuration of the Vision Transformer in a folder, see `is_saved_model`.

    Raises:
        ValueError: it holds a language model.
    """
    if (folder / MODEL_FILE).is_file():
        saved: ViTConfig = model_from_tree("vit", read_json(folder / MODEL_FILE))
        return saved
    model = freeze(read_config(folder / CONFIG_FILE)).model
    if not isinstance(model, ViTConfig):
        raise ValueError(f"{folder} is a run of task='lm'; name one of task='vit'")
    return model


def load_model(folder: pathlib.Path, which: str = "newest") -> EMoEViT:
    """The Vision Transformer of a run or of `save_model`, without reading any data.

    Its arrays are on the first device of this process.

    Args:
        folder: see `is_saved_model`.
        which: the checkpoint: "newest", "best" or its step.

    Raises:
        ValueError: it holds a language model.
        FileNotFoundError: there is no such checkpoint.
    """
    config = read_model_config(folder)
    model, params, router = pure.abstract_split(model_maker(config, 0))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    state = {"params": params} | ({"router": router} if router else {})
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), state
    )
    with Checkpoints(folder / CHECKPOINTS, every=1, read_only=True) as checkpoints:
        step = choose_step(checkpoints, which)
        state = {"router": {}} | checkpoints.restore(step, wanted, partial=True).train_state
    bound: EMoEViT = model.bind(state["params"], state["router"])
    return bound
