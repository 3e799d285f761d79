"""Benchmark `peers`: an expert layer against what one would take instead, with the same weights.

The layer is that of Mixtral and of Qwen3-MoE: a softmax router whose gates are renormalised over
the K chosen experts, and SwiGLU experts. `emoe_jax` is this library's. `ragged_dot` and `tokamax`
are the layer as plainly as it can be written around `jax.lax.ragged_dot` and
`tokamax.ragged_dot`: sort, gather, three grouped products, scatter-add. The others are blocks of
transformers in PyTorch, with its implementations of the experts "eager" and "grouped_mm"
("batched_mm" copies an expert's matrices for every token: 12 T K D F bytes in float32).

Each row tells how far its outputs and its gradient of the tokens are from ours.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from emoe_jax import pure
from emoe_jax.config import MoEConfig, RouterConfig, require
from emoe_jax.moe import MoE
from train.bench_grouped import Rounds, Shape
from train.timing import Row, Step, against, interleave

Array = jax.Array
Weights = dict[str, np.ndarray]

OURS = "emoe_jax"


def peers(shapes: list[Shape], names: list[str], rounds: Rounds) -> list[Row]:
    """Times the layers of each shape in turn.

    Args:
        shapes: which differ in E.
        names: of `PEERS`.
        rounds: how often; `ragged` is for those that are dense here.

    Returns:
        One row for each shape and layer: milliseconds (median, least, most) and ratios to ours,
        forward alone (`forward_`) and with the gradients of tokens and weights (`step_`); `apart`,
        the largest difference of outputs and token gradients, each relative to the largest of ours;
        `of`, the packages whose layer it is, with their versions.

    Raises:
        ValueError: an unknown name, a package that is missing, or K above E.
    """
    for name in names:
        require(name in PEERS, f"--peers={name} is not known; choose from {', '.join(PEERS)}.")
        for package in PEERS[name].packages:
            require(
                importlib.util.find_spec(package) is not None,
                f"--peers={name} needs the package {package}; pip install 'emoe_jax[peers]', or"
                " leave it out of --peers.",
            )
    return [row for shape in shapes for row in _rows(shape, names, rounds)]


def _rows(shape: Shape, names: list[str], rounds: Rounds) -> list[Row]:
    weights, tokens = _operands(shape)
    layers = {OURS: _ours(shape, weights, tokens)}
    turns = {OURS: rounds.most}
    for name in names:
        layers[name] = PEERS[name].build(shape, weights, tokens)
        dense = jax.default_backend() in PEERS[name].dense_on
        turns[name] = min(rounds.ragged, rounds.most) if dense else rounds.most
    layers = {name: layer for name, layer in layers.items() if turns[name]}
    results = {name: _results(layer) for name, layer in layers.items()}
    calls = {(name, part): layers[name][part] for name in layers for part in ("forward", "step")}
    times = interleave(calls, {key: turns[key[0]] for key in calls})
    rows = []
    for name in layers:
        row: Row = {"layer": name, "E": shape.E, "dtype": shape.dtype, "rounds": turns[name]}
        for part in ("forward", "step"):
            row |= against(part, times[name, part], times[OURS, part])
        packages = PEERS[name].packages if name in PEERS else ()
        rows.append(row | {"apart": _apart(results[name], results[OURS]), "of": _of(packages)})
    return rows


def _of(packages: tuple[str, ...]) -> str:
    """Packages with their versions."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def _operands(shape: Shape) -> tuple[Weights, np.ndarray]:
    """Weights by our names, and tokens [T,D], in float32."""
    random = np.random.default_rng(0)
    E, D, F = shape.E, shape.D, shape.F

    def normal(*sizes: int) -> np.ndarray:
        return random.standard_normal(sizes, np.float32) / np.float32(sizes[-2] ** 0.5)

    experts = {"w_gate": normal(E, D, F), "w_up": normal(E, D, F), "w_down": normal(E, F, D)}
    return experts | {"router": normal(D, E)}, random.standard_normal((shape.T, D), np.float32)


def _results(layer: Mapping[str, Step]) -> tuple[np.ndarray, np.ndarray]:
    """Outputs and the gradient of the tokens, on the host, which no time includes."""
    out, gradient = (_on_host(layer[part]()) for part in ("forward", "step"))
    return out, gradient


def _on_host(result: Any) -> np.ndarray:
    if isinstance(result, jax.Array):
        return np.asarray(result, np.float32)
    array: np.ndarray = result.detach().float().cpu().numpy()  # a tensor of PyTorch
    return array


def _apart(mine: tuple[np.ndarray, ...], ours: tuple[np.ndarray, ...]) -> float:
    differences = (
        np.max(np.abs(a.reshape(b.shape) - b)) / np.max(np.abs(b))
        for a, b in zip(mine, ours, strict=True)
    )
    return float(max(differences))


# ----------------------------------------------------------------------------------------- in JAX


def _ours(shape: Shape, weights: Weights, tokens: np.ndarray) -> dict[str, Step]:
    config = MoEConfig(
        router="softmax",
        experts=shape.E,
        top_k=shape.K,
        hidden=shape.F,
        activation="swiglu",
        routing=RouterConfig(renormalize=True),
    )
    layer = MoE(config, shape.D, dtype=shape.dtype, rngs=nnx.Rngs(0))
    graph, _, state = pure.split(layer)
    # As the others have them: no time includes a cast of the weights.
    experts = {n: jnp.asarray(weights[n], shape.dtype) for n in ("w_gate", "w_up", "w_down")}
    params = {"router": {"kernel": jnp.asarray(weights["router"])}, "experts": experts}

    def forward(params: Any, tokens: Array) -> Array:
        out: Array = graph.bind(params, state)(tokens[None])[0][0]
        return out

    return _compiled(forward, params, jnp.asarray(tokens, shape.dtype))


def _compiled(
    forward: Callable[[Any, Array], Array], weights: Any, tokens: Array
) -> dict[str, Step]:
    """The forward pass, and `step`, which computes all gradients and returns that of the tokens."""

    def loss(weights: Any, tokens: Array) -> Array:
        return jnp.sum(jnp.square(forward(weights, tokens)), dtype=jnp.float32)

    programs = {"forward": forward, "step": jax.grad(loss, argnums=(0, 1))}
    compiled = {
        part: jax.jit(program).lower(weights, tokens).compile()
        for part, program in programs.items()
    }
    return {
        "forward": partial(compiled["forward"], weights, tokens),
        "step": lambda: compiled["step"](weights, tokens)[1],
    }


def _plain(product: Callable[..., Array], shape: Shape, weights: Weights, tokens: Any) -> Any:
    """The layer around a product with the interface of `jax.lax.ragged_dot`."""
    arrays = {name: jnp.asarray(leaf, shape.dtype) for name, leaf in weights.items()}
    arrays["router"] = jnp.asarray(weights["router"])

    def forward(weights: dict[str, Array], tokens: Array) -> Array:
        scores = jnp.matmul(tokens.astype(jnp.float32), weights["router"])
        gates, experts = jax.lax.top_k(jax.nn.softmax(scores), shape.K)
        gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
        order = jnp.argsort(experts.reshape(-1))
        sizes = jnp.bincount(experts.reshape(-1), length=shape.E).astype(jnp.int32)
        rows = tokens[order // shape.K]
        hidden = jax.nn.silu(product(rows, weights["w_gate"], sizes))
        hidden = hidden * product(rows, weights["w_up"], sizes)
        out = product(hidden, weights["w_down"], sizes) * gates.reshape(-1)[order, None]
        return jnp.zeros_like(tokens).at[order // shape.K].add(out.astype(tokens.dtype))

    return _compiled(forward, arrays, jnp.asarray(tokens, shape.dtype))


def _ragged_dot(shape: Shape, weights: Weights, tokens: np.ndarray) -> dict[str, Step]:
    layer: dict[str, Step] = _plain(jax.lax.ragged_dot, shape, weights, tokens)
    return layer


def _tokamax(shape: Shape, weights: Weights, tokens: np.ndarray) -> dict[str, Step]:
    # It reads its own absl flags and would parse this program's command line for them.
    flags.FLAGS.mark_as_parsed()
    product = importlib.import_module("tokamax").ragged_dot
    layer: dict[str, Step] = _plain(product, shape, weights, tokens)
    return layer


# ------------------------------------------------------------------------------------- in PyTorch


def _transformers(
    family: str, experts: str, shape: Shape, weights: Weights, tokens: np.ndarray
) -> dict[str, Step]:
    """A block of transformers on the first GPU, or on all cores."""
    torch: Any = importlib.import_module("torch")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, shape.dtype)
    block = _block(family, experts, shape).to(device=device, dtype=dtype)
    gate_up = np.concatenate([weights["w_gate"], weights["w_up"]], axis=2)
    named = {
        "gate.weight": weights["router"].T,
        "experts.gate_up_proj": gate_up.transpose(0, 2, 1),
        "experts.down_proj": weights["w_down"].transpose(0, 2, 1),
    }
    block.load_state_dict(
        {name: torch.tensor(np.ascontiguousarray(leaf)) for name, leaf in named.items()}
    )
    x = torch.tensor(tokens, device=device, dtype=dtype)[None].requires_grad_()

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def forward() -> Any:
        with torch.no_grad():
            out = block(x)
        wait()
        return out

    def step() -> Any:
        block.zero_grad(set_to_none=True)
        x.grad = None
        block(x).square().sum(dtype=torch.float32).backward()
        wait()
        return x.grad

    return {"forward": forward, "step": step}


def _block(family: str, experts: str, shape: Shape) -> Any:
    """A block without its weights."""
    models = importlib.import_module("transformers")
    code = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    common = {"hidden_size": shape.D, "num_experts_per_tok": shape.K, "hidden_act": "silu"}
    if family == "mixtral":
        own = {"intermediate_size": shape.F, "num_local_experts": shape.E}
        config, made = models.MixtralConfig(**common, **own), code.MixtralSparseMoeBlock
    else:
        own = {"moe_intermediate_size": shape.F, "num_experts": shape.E, "norm_topk_prob": True}
        config, made = models.Qwen3MoeConfig(**common, **own), code.Qwen3MoeSparseMoeBlock
    config._experts_implementation = experts
    return made(config)


@dataclasses.dataclass(frozen=True)
class Peer:
    """Somebody else's layer.

    Attributes:
        build: (shape, weights, tokens) to the programs "forward" and "step".
        packages: what it needs that this library does not.
        dense_on: where it does E times the arithmetic, by JAX's names of platforms.
    """

    build: Callable[[Shape, Weights, np.ndarray], dict[str, Step]]
    packages: tuple[str, ...] = ()
    dense_on: tuple[str, ...] = ()


PEERS: dict[str, Peer] = {
    "ragged_dot": Peer(_ragged_dot, (), ("cpu", "gpu")),
    "tokamax": Peer(_tokamax, ("tokamax",), ("cpu",)),
} | {
    f"{family}-{experts}": Peer(
        functools.partial(_transformers, family, experts), ("torch", "transformers")
    )
    for family in ("mixtral", "qwen3_moe")
    for experts in ("eager", "grouped_mm")
}
