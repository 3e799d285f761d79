"""An experiment as one tree of keys.

Written by configs/NAME.py, overridden on the command line, checked and frozen before anything else
happens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import reprlib
import threading
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from emoe_jax.config import LMConfig, MoEConfig, ViTConfig, require, require_positive
from emoe_jax.optim import OptimConfig
from emoe_jax.sharding import MeshConfig
from train.config_tree import build, defaults, flatten, unknown_key
from train.data.config import TextConfig, VisionConfig

TASKS: dict[str, tuple[type, type]] = {
    "lm": (LMConfig, TextConfig),
    "vit": (ViTConfig, VisionConfig),
}
"""Model and data configuration of each task."""

FROM_DATA = {"lm": ("vocab_size",), "vit": ("image_size", "channels", "classes")}
"""Fields of the model that the data decide, so no experiment sets them."""


def _require_timeout(name: str, seconds: float) -> None:
    """Refuses what no timer takes, in whose thread nobody would see the error."""
    require(
        seconds <= threading.TIMEOUT_MAX,
        f"{name}={seconds} is more than {threading.TIMEOUT_MAX:.0f}, which timers take at most; set"
        " it lower",
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written.

    Attributes:
        every: steps between checkpoints; the last step is always saved.
        keep_last: how many of the newest are kept; damaged ones that were set aside do not count.
        keep_every: multiples of this many steps are kept for ever besides, 0 for none; a multiple
            of `every`.
        keep_best: how many of the best by held-out loss are kept besides, among those written at a
            step that is evaluated (a multiple of eval_every).
        grace_s: seconds after SIGTERM or SIGINT in which the run saves and ends, see
            `train.notice`; below what the machine leaves it, which is often 30.
    """

    every: int = 200
    keep_last: int = 2
    keep_every: int = 0
    keep_best: int = 1
    grace_s: float = 25.0

    def __post_init__(self) -> None:
        """Checks the values."""
        require_positive(every=self.every, keep_last=self.keep_last)
        for name in ("keep_best", "keep_every"):
            value = getattr(self, name)
            require(value >= 0, f"checkpoint.{name}={value} is below zero")
        require(
            self.keep_every % self.every == 0,
            f"checkpoint.keep_every={self.keep_every} is no multiple of checkpoint.every="
            f"{self.every}, so those steps are not all saved; set checkpoint.keep_every to"
            f" {-(-self.keep_every // self.every) * self.every}",
        )
        require(self.grace_s > 0, f"checkpoint.grace_s={self.grace_s} is not above zero")
        _require_timeout("checkpoint.grace_s", self.grace_s)


@dataclasses.dataclass(frozen=True)
class AlarmConfig:
    """Above which values of a layer the log warns; see `metrics` for what they are.

    Attributes:
        dead: experts dead over the last 100 steps.
        max_vio: MaxVio over the last 100 steps.
        orthonormality: orthonormality error of a basis.
        drops: fraction of the assignments that were dropped.
        left_out: fraction of the tokens that a router's running statistics leave out, because the
            square of their length is no finite number.
        loss_spike: by how many times its spread over the last 100 steps a loss exceeds their
            median, see `telemetry.Spikes`. Of 18,799 logged losses of 57 runs with several routers,
            on text and images, 2 were above 8 and 10 above 4.
    """

    dead: int = 0
    max_vio: float = 1.0
    orthonormality: float = 1e-4
    drops: float = 0.05
    left_out: float = 0.0
    loss_spike: float = 8.0

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in ("dead", "max_vio", "orthonormality", "drops", "left_out", "loss_spike"):
            value = getattr(self, name)
            require(value >= 0, f"alarm.{name}={value} is below zero")


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """When a run goes back to a checkpoint (`train.guards`) or says that it hangs (`.watchdog`).

    Attributes:
        skips: steps in a row that are skipped, as their loss or gradients are not finite, after
            which the run goes back to its last checkpoint; 0: it never does. Where one batch in ten
            is bad by chance, 5 in a row come once in 10^5 steps; a run that has diverged has no
            other steps any more, and loses little by waiting for 5.
        rollbacks: how often it may, in all; where one more is due it ends with an error. Each
            passes over what led to it, so a run that needs another and another has another fault.
        stall_s: seconds without the end of a training step after which every process writes the
            stacks of its threads; 0: none does.
        pause_s: the same for what is no training step: the first one, which compiles, an
            evaluation, a checkpoint; 0: these are not watched.
    """

    skips: int = 5
    rollbacks: int = 3
    stall_s: float = 300.0
    pause_s: float = 3600.0

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in ("skips", "rollbacks", "stall_s", "pause_s"):
            value = getattr(self, name)
            require(value >= 0, f"guard.{name}={value} is below zero")
        for name in ("stall_s", "pause_s"):
            _require_timeout(f"guard.{name}", getattr(self, name))


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything that a run depends on.

    Attributes:
        task: "lm" or "vit".
        steps: optimizer steps.
        seed: of initial weights, data order and routers' random choices.
        batch: sequences or images in the global batch of one optimizer step.
        accumulate: microbatches into which a batch is split.
        calibrate: batches, drawn for this alone, that pass forward before the first step, so that
            routers with running statistics begin with some.
        settle: batches, likewise, that pass forward after the last step, so that these statistics
            and the routers' offsets come to rest; -1 is a tenth of the steps, at most 300.
        log_every: steps between lines of metrics.
        eval_every: steps between evaluations on held-out data; the last step always has one.
        profile: steps of which an xprof trace is written, 0 for none.
        prompt: beginning of the text that a language model continues at the end of training.
        init_from: where a Vision Transformer's initial weights come from, see `train.initial`: the
            folder of a run or of `train.convert`, or a file, a folder or a Hub name in PyTorch
            format. Empty: they are drawn. A resumed run does not read it.
        model: the model, its experts and their router included.
        data: the data.
        optim: the optimizer.
        mesh: the device mesh.
        checkpoint: when checkpoints are written.
        alarm: when the log warns.
        guard: what is done about steps that are not finite or do not end.
    """

    task: str
    model: LMConfig | ViTConfig
    data: TextConfig | VisionConfig
    steps: int = 1000
    seed: int = 0
    batch: int = 32
    accumulate: int = 1
    calibrate: int = 10
    settle: int = -1
    log_every: int = 10
    eval_every: int = 200
    profile: int = 0
    prompt: str = ""
    init_from: str = ""
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    alarm: AlarmConfig = AlarmConfig()
    guard: GuardConfig = GuardConfig()

    def __post_init__(self) -> None:
        """Checks the values."""
        require_positive(steps=self.steps, batch=self.batch, accumulate=self.accumulate)
        require_positive(log_every=self.log_every, eval_every=self.eval_every)
        require(self.calibrate >= 0, f"calibrate={self.calibrate} is below zero")
        require(self.settle >= -1, f"settle={self.settle} is below -1, which lets it follow steps")
        require(self.profile >= 0, f"profile={self.profile} is below zero")
        require(self.seed >= 0, f"seed={self.seed} is below zero")
        require(
            not self.init_from or self.task == "vit",
            f"init_from={self.init_from!r} starts a Vision Transformer from weights, and this is"
            f" task={self.task!r}; leave init_from empty",
        )
        require(
            self.batch % self.data.shards == 0,
            f"batch={self.batch} is not a multiple of data.shards={self.data.shards}, each of which"
            " fills an equal part of it; change one of them",
        )
        require(
            self.optim.warmup < self.steps,
            f"optim.warmup={self.optim.warmup} is not below steps={self.steps}; set optim.warmup to"
            f" {self.steps // 10}, or train longer",
        )

    @property
    def settling(self) -> int:
        """How many batches pass forward after the last step."""
        return min(300, self.steps // 10) if self.settle == -1 else self.settle


def experiment(task: str, **overrides: Any) -> config_dict.ConfigDict:
    """All keys of an experiment with their defaults, for the `get_config` of a config file.

    Args:
        task: "lm" or "vit".
        **overrides: values by key; nested keys as dicts, such as moe={"experts": 16}.

    Raises:
        ValueError: an unknown task or key, or a value of another type.
    """
    model, data = _of_task(task)
    tree = {"task": task} | defaults(ExperimentConfig)
    hidden = {*FROM_DATA[task], "moe"}
    tree["model"] = {k: v for k, v in defaults(model).items() if k not in hidden}
    tree["moe"] = defaults(MoEConfig)
    tree["data"] = defaults(data)
    config = config_dict.ConfigDict(tree, type_safe=True)
    config.lock()
    update(config, flatten(overrides))
    return config


def update(config: config_dict.ConfigDict, values: Mapping[str, Any]) -> None:
    """Sets dotted keys.

    Raises:
        ValueError: an unknown key (with the nearest that exists), or a value of another type.
    """
    known = flat_keys(config)
    for name, value in values.items():
        if name not in known:
            raise ValueError(unknown_key(name, known))
        try:
            config.update_from_flattened_dict({name: value})
        except TypeError as error:
            raise ValueError(
                f"config key {name!r} cannot be {reprlib.repr(value)}: {error}"
            ) from None


def replaced(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a plain tree, such as config.json's, with dotted keys set.

    Raises:
        ValueError: an unknown key.
    """
    known = list(flatten(tree))
    copy = json.loads(json.dumps(tree))
    for name, value in values.items():
        if name not in known:
            raise ValueError(unknown_key(name, known))
        *parents, last = name.split(".")
        node = copy
        for parent in parents:
            node = node[parent]
        node[last] = value
    return dict(copy)


def filled(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of config.json's tree, with the defaults of keys that are younger than it.

    Raises:
        ValueError: an unknown task.
    """
    return merged(experiment(tree.get("task", "")).to_dict(), tree)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of one tree over another.

    Raises:
        ValueError: a group of keys of the lower one is something else in the upper one.
    """
    tree = dict(below) | dict(above)
    both = [k for k in below.keys() & above.keys() if isinstance(below[k], dict)]
    for name in both:
        require(
            isinstance(above[name], Mapping),
            f"config key {name!r} is {reprlib.repr(above[name])}, and holds a group of keys",
        )
    return tree | {name: merged(below[name], above[name]) for name in both}


def flat_keys(config: config_dict.ConfigDict) -> list[str]:
    """Dotted names of all values."""
    return list(flatten(config.to_dict()))


def freeze(config: Mapping[str, Any]) -> ExperimentConfig:
    """The checked configuration of an experiment's tree (a ConfigDict, or config.json's object).

    Fields that the data decide hold what the data configuration says; a language model's
    vocabulary is set once its tokenizer is known, see `with_vocab`.

    Raises:
        ValueError: an unknown key, a value of another type, or an impossible value or combination.
    """
    tree = config.to_dict() if isinstance(config, config_dict.ConfigDict) else dict(config)
    task = tree["task"]
    model_class, data_class = _of_task(task)
    data = build(data_class, tree.pop("data"), "data.")
    model = dict(tree.pop("model"))
    model["moe"] = tree.pop("moe")
    model |= {name: getattr(data, name) for name in FROM_DATA[task]}
    built = {"model": build(model_class, model, "model."), "data": data}
    return build(ExperimentConfig, tree | built)


def model_from_tree(task: str, tree: Mapping[str, Any]) -> Any:
    """A model's configuration from `dataclasses.asdict` of it, read back from JSON.

    Raises:
        ValueError: an unknown task or key.
    """
    require(task in TASKS, f"task={task!r} is not known; choose one of {', '.join(TASKS)}")
    return build(TASKS[task][0], tree)


def with_vocab(config: ExperimentConfig, vocab_size: int) -> ExperimentConfig:
    """The configuration with the vocabulary of the tokenizer in use."""
    assert isinstance(config.model, LMConfig)
    model = dataclasses.replace(config.model, vocab_size=vocab_size)
    return dataclasses.replace(config, model=model)


def to_json(config: Mapping[str, Any]) -> str:
    """The tree as text, keys in order."""
    tree = config.to_dict() if isinstance(config, config_dict.ConfigDict) else config
    return json.dumps(tree, indent=2, sort_keys=True) + "\n"


def digest(config: Mapping[str, Any]) -> str:
    """Hexadecimal hash of the tree."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()[:16]


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Lines "key: old -> new" for the values in which two trees differ."""
    old, new = flatten(json.loads(to_json(before))), flatten(json.loads(to_json(after)))
    names = sorted(old.keys() | new.keys())
    return [f"{n}: {old.get(n)!r} -> {new.get(n)!r}" for n in names if old.get(n) != new.get(n)]


def _of_task(task: Any) -> tuple[type, type]:
    """Model and data configuration of a task."""
    known = isinstance(task, str) and task in TASKS
    require(known, f"task={reprlib.repr(task)} is not known; choose one of {', '.join(TASKS)}")
    return TASKS[task]
