"""Frozen configurations of the library's parts: what a user sets, checked before anything is built.

Sizes are written with the letters of the project: D width, E experts, K experts per token, R rank
of the eigenbasis, F hidden width, H heads. Every class checks its own values when it is made and
raises `ValueError` with the value, the limit and a remedy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

BASIS_METHODS = ("qr", "cholesky_qr", "retraction")
DISPATCHERS = ("dense", "capacity", "dropless")
EXCHANGES = ("auto", "all_to_all", "ragged_all_to_all", "all_gather")
OVERFLOWS = ("exact", "drop")
ACTIVATIONS = ("swiglu", "gelu")
REMAT = ("none", "full", "dots", "exchange")
DTYPES = ("float32", "bfloat16")
SCORES = ("softmax", "sigmoid")
SUBSPACES = ("tracked", "learned", "fixed")
BASIS_ROUTERS = ("eigen", "whitened")
DEFAULT_RANK = 128
ATTENTION = ("auto", "xla", "heads_first", "cudnn", "splash")


def require(condition: bool, message: str) -> None:
    """Raises `ValueError(message)` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def require_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raises `ValueError` unless `value` is one of `choices`."""
    require(value in choices, f"{name}={value!r} is not known; choose one of {', '.join(choices)}")


def require_positive(**values: float) -> None:
    """Raises `ValueError` for the first of `values` that is not above zero."""
    for name, value in values.items():
        require(value > 0, f"{name}={value} must be above zero")


@dataclasses.dataclass(frozen=True)
class BasisConfig:
    """The orthonormal basis [D,R] of an eigenbasis router.

    Attributes:
        rank: R, number of basis directions; at most the width D of the layer. 0: 128, or D where
            that is less.
        method: how the basis stays orthonormal. "qr": the basis is the sign-fixed QR factor of its
            weight, gradients pass through the factorisation. "cholesky_qr": the same map, computed
            by Cholesky-QR done twice. "retraction": gradients see the basis as a free matrix and
            the optimizer's step is retracted by QR, as in the paper's code.
        companion: whether the router keeps the release's second basis P and its log_lambda, which
            never reach the output and which its checkpoints hold (see docs/paper.md).
    """

    rank: int = 0
    method: str = "qr"
    companion: bool = False

    def __post_init__(self) -> None:
        """Checks the values."""
        require(self.rank >= 0, f"basis.rank={self.rank} must not be negative")
        require_choice("basis.method", self.method, BASIS_METHODS)

    def rank_of(self, width: int) -> int:
        """R for tokens of width D.

        Raises:
            ValueError: it is more than D.
        """
        require(
            self.rank <= width,
            f"basis.rank={self.rank} is more than width={width}: D dimensions hold at most D"
            f" orthonormal directions; set basis.rank to {width} or less",
        )
        return self.rank or min(width, DEFAULT_RANK)


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """Options of the routers; None means the router's own default.

    An option that the chosen router does not read must stay None: setting it is an error.

    Attributes:
        temperature: tau, divides the scores before the softmax (eigen, softmax, switch; default 1);
            learned, and this its first value (whitened, softmax_offset; default 0.6).
        score: "softmax" or "sigmoid", maps scores to gates (loss_free, default
            "sigmoid"; whitened, softmax_offset, default "softmax").
        renormalize: whether the gates of the K chosen experts are divided by their sum (softmax,
            switch, loss_free, whitened, softmax_offset; default False).
        balance_weight: weight of the Switch balance loss (switch; default 0.01).
        z_weight: weight of the router z-loss (softmax, switch; default 0).
        bias_rate: u, the step of the selection bias (loss_free; default 0.001).
        offset: whether an offset of the scores balances the loads (whitened; default True).
        subspace: where the basis comes from: "tracked", the principal subspace of the tokens;
            "learned", by gradients; or "fixed", drawn once (whitened; default "tracked").
        whitening: alpha, the power of the covariance by which projections are divided: 1/2 whitens
            fully, 0 not at all (whitened; default 1/4).
        orthogonality_weight: lambda, weight of the orthogonality penalty (eigen; default 5e-4).
        acausal: True says that a language model may use a router that looks at later tokens
            (expert_choice; default: refused).
    """

    temperature: float | None = None
    score: str | None = None
    renormalize: bool | None = None
    balance_weight: float | None = None
    z_weight: float | None = None
    bias_rate: float | None = None
    offset: bool | None = None
    subspace: str | None = None
    whitening: float | None = None
    orthogonality_weight: float | None = None
    acausal: bool | None = None

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.temperature is not None:
            require_positive(temperature=self.temperature)
        if self.score is not None:
            require_choice("routing.score", self.score, SCORES)
        if self.subspace is not None:
            require_choice("routing.subspace", self.subspace, SUBSPACES)
        if self.whitening is not None:
            require(
                0 <= self.whitening <= 0.5,
                f"routing.whitening={self.whitening} must lie between 0 (none) and 0.5 (full)",
            )
        for name in ("balance_weight", "z_weight", "bias_rate", "orthogonality_weight"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"routing.{name}={value} must not be negative")

    def given(self) -> dict[str, float | str | bool]:
        """The options that are set, by name."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """One Mixture-of-Experts layer.

    Attributes:
        router: name of the router, see `emoe_jax.routers.ROUTERS`.
        experts: E, number of experts.
        top_k: K, experts per token; the router "soft" always uses all E and needs top_k == experts.
        hidden: F, hidden width of one expert.
        dispatch: "dense" (every expert on every token, the oracle), "capacity" (C slots an expert,
            overflow dropped and counted) or "dropless" (sorted by expert, nothing dropped).
        capacity_factor: c, an expert has C = ceil(c T K / E) slots; read by dispatch "capacity".
        exchange: how tokens travel where experts are spread over a mesh: "all_to_all",
            "ragged_all_to_all", "all_gather" or "auto" (see `dispatch.exchange`).
        buffer_factor: room of the exchange, in units of what a balanced load needs.
        on_overflow: what happens to tokens that find no room: "exact" sends them in further rounds,
            "drop" drops and counts them.
        exchange_chunks: parts into which a device's tokens are cut, so that one part's exchange can
            run beside another's products; on TPU only if the program is compiled with asynchronous
            all-to-alls, as the training step of `train` is, and its scheduler makes use of them.
        activation: "swiglu" (three matrices) or "gelu" (two, exact GELU).
        bias: whether experts have biases.
        shared_hidden: hidden width of an expert that takes every token, 0 for none.
        basis: the eigenbasis; read by eigenbasis routers.
        routing: options of the router.
    """

    router: str = "whitened"
    experts: int = 8
    top_k: int = 1
    hidden: int = 512
    dispatch: str = "dropless"
    capacity_factor: float = 1.25
    exchange: str = "auto"
    buffer_factor: float = 1.25
    on_overflow: str = "exact"
    exchange_chunks: int = 1
    activation: str = "swiglu"
    bias: bool = False
    shared_hidden: int = 0
    basis: BasisConfig = BasisConfig()
    routing: RouterConfig = RouterConfig()

    def __post_init__(self) -> None:
        """Checks the values."""
        require_positive(experts=self.experts, top_k=self.top_k, hidden=self.hidden)
        require_positive(capacity_factor=self.capacity_factor)
        require(
            self.top_k <= self.experts,
            f"top_k={self.top_k} is more than experts={self.experts}: a token can go to at most all"
            f" experts; set top_k to {self.experts} or less, or experts to {self.top_k} or more",
        )
        require_positive(buffer_factor=self.buffer_factor, exchange_chunks=self.exchange_chunks)
        require_choice("dispatch", self.dispatch, DISPATCHERS)
        require_choice("exchange", self.exchange, EXCHANGES)
        require_choice("on_overflow", self.on_overflow, OVERFLOWS)
        require_choice("activation", self.activation, ACTIVATIONS)
        require(self.shared_hidden >= 0, f"shared_hidden={self.shared_hidden} is below zero")


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """A decoder language model.

    Attributes:
        vocab_size: N, number of token ids.
        width: D.
        depth: number of blocks.
        heads: H, query heads.
        kv_heads: key and value heads, a divisor of `heads`; 0 means as many as `heads`.
        head_dim: width of one head, even (rotary positions turn pairs); 0 means width / heads.
        mlp_hidden: hidden width of the dense MLP in blocks without experts.
        moe_every: every n-th block (the n-th, 2n-th, ...) has experts; 1 is every block, 0 none.
        moe_blocks: the blocks that have experts, counted from 0, in place of `moe_every`. Periodic
            patterns run as a scan over the depth, lists are unrolled.
        qk_norm: whether queries and keys are normalised (RMS) before attention.
        rope_base: base of the rotary frequencies (arXiv 2104.09864, section 3.2.2).
        tie_head: whether the output head is the transposed token embedding.
        attention: "auto", "xla", "heads_first" (fast on CPU), "cudnn" (GPU, bfloat16) or "splash"
            (TPU).
        remat: what is recomputed in the backward pass: "none", "full" (each block), "dots" (each
            block except its matrix products) or "exchange" (each block except its routing decisions
            and what its exchanges brought), see `emoe_jax.remat`.
        loss_chunk: tokens whose logits a device holds at once for the training loss.
        dtype: compute dtype of attention and experts; parameters stay float32.
        moe: the layers of experts.
    """

    vocab_size: int = 256
    width: int = 256
    depth: int = 4
    heads: int = 4
    kv_heads: int = 0
    head_dim: int = 0
    mlp_hidden: int = 1024
    moe_every: int = 1
    moe_blocks: tuple[int, ...] = ()
    qk_norm: bool = True
    rope_base: float = 10000.0
    tie_head: bool = True
    attention: str = "auto"
    remat: str = "none"
    loss_chunk: int = 1024
    dtype: str = "float32"
    moe: MoEConfig = MoEConfig()

    def __post_init__(self) -> None:
        """Checks the values."""
        require_positive(vocab_size=self.vocab_size, loss_chunk=self.loss_chunk)
        require_positive(mlp_hidden=self.mlp_hidden, rope_base=self.rope_base)
        _check_trunk(self)
        dim = self.head_dim or self.width // self.heads
        require(dim % 2 == 0, f"head_dim={dim} is odd; rotary positions need an even head_dim")
        kv_heads = self.kv_heads or self.heads
        require(
            kv_heads > 0 and self.heads % kv_heads == 0,
            f"kv_heads={kv_heads} does not divide heads={self.heads}; choose a divisor",
        )
        require_choice("attention", self.attention, ATTENTION)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A Vision Transformer.

    Attributes:
        image_size: side of the square images in pixels, a multiple of `patch`.
        patch: side of a patch in pixels.
        channels: image channels.
        classes: N, number of classes; 0 for no head: the model then gives pooled features.
        width: D.
        depth: number of blocks.
        heads: H.
        head_dim: width of one head; 0 means width / heads.
        mlp_hidden: hidden width of the dense MLP in blocks without experts, and in all blocks of
            the adapter form.
        pooling: "class" (the class token) or "mean" (mean over patches).
        class_token: whether there is a class token though pooling is "mean".
        distilled: whether a distillation token follows the class token, with a head of its own; the
            logits are the mean of both heads' (arXiv 2012.12877).
        registers: number of register tokens behind the class token (arXiv 2309.16588).
        embed_prefix: whether class, distillation and register tokens have learned positions.
        norm_after_pooling: whether the last norm stands behind the pooling.
        layer_scale: initial value of the factors of each block's branches (arXiv 2103.17239), 0 for
            none.
        qk_norm: whether queries and keys are normalised (LayerNorm) before attention.
        qkv_bias: whether the maps to queries, keys and values have biases.
        moe_form: "mlp": experts replace the MLP of the chosen blocks. "adapter": experts stand
            after the whole block as a branch h + alpha * MoE(h), the paper's form.
        route_class: whether the class token takes the adapter's branch too; otherwise it passes by.
        moe_every: as in `LMConfig`.
        moe_blocks: as in `LMConfig`.
        attention: as in `LMConfig`.
        remat: as in `LMConfig`.
        dtype: as in `LMConfig`.
        moe: the layers of experts.
    """

    image_size: int = 28
    patch: int = 4
    channels: int = 1
    classes: int = 10
    width: int = 128
    depth: int = 4
    heads: int = 4
    head_dim: int = 0
    mlp_hidden: int = 512
    pooling: str = "mean"
    class_token: bool = False
    distilled: bool = False
    registers: int = 0
    embed_prefix: bool = True
    norm_after_pooling: bool = False
    layer_scale: float = 0.0
    qk_norm: bool = False
    qkv_bias: bool = True
    moe_form: str = "mlp"
    route_class: bool = False
    moe_every: int = 1
    moe_blocks: tuple[int, ...] = ()
    attention: str = "auto"
    remat: str = "none"
    dtype: str = "float32"
    moe: MoEConfig = MoEConfig(activation="gelu")

    def __post_init__(self) -> None:
        """Checks the values."""
        require_positive(
            image_size=self.image_size,
            patch=self.patch,
            channels=self.channels,
            mlp_hidden=self.mlp_hidden,
        )
        _check_trunk(self)
        require(
            self.image_size % self.patch == 0,
            f"patch={self.patch} does not divide image_size={self.image_size}; choose a divisor",
        )
        require_choice("pooling", self.pooling, ("class", "mean"))
        require_choice("moe_form", self.moe_form, ("mlp", "adapter"))
        require(self.classes >= 0, f"classes={self.classes} is below zero; 0 means no head")
        require(self.registers >= 0, f"registers={self.registers} is below zero")
        require(self.layer_scale >= 0, f"layer_scale={self.layer_scale} is below zero")
        require(
            not self.distilled
            or (self.pooling == "class" and not self.registers and not self.norm_after_pooling),
            "distilled needs pooling='class', no registers and the last norm before the pooling;"
            f" got pooling={self.pooling!r}, registers={self.registers} and"
            f" norm_after_pooling={self.norm_after_pooling}",
        )
        require(
            not self.route_class or (self.moe_form == "adapter" and self.has_class_token),
            "route_class is set, but there is no adapter with a class token to take; set it to"
            " False, or moe_form to 'adapter' and pooling to 'class'",
        )
        require_choice("attention", self.attention, ATTENTION)

    @property
    def has_class_token(self) -> bool:
        """Whether a class token stands before the patches."""
        return self.class_token or self.pooling == "class"

    @property
    def prefix(self) -> int:
        """Tokens before the patches: class, distillation, registers."""
        return self.has_class_token + self.distilled + self.registers


def _check_trunk(config: LMConfig | ViTConfig) -> None:
    """What language models and Vision Transformers have in common."""
    require_positive(width=config.width, depth=config.depth, heads=config.heads)
    require(
        config.head_dim >= 0, f"head_dim={config.head_dim} is below zero; 0 means width / heads"
    )
    require(
        config.head_dim > 0 or config.width % config.heads == 0,
        f"heads={config.heads} does not divide width={config.width}; choose a divisor or set"
        " head_dim",
    )
    require_choice("remat", config.remat, REMAT)
    require_choice("dtype", config.dtype, DTYPES)
    require(
        config.moe_every >= 0,
        f"moe_every={config.moe_every} is below zero; 0 means no block has experts",
    )
    outside = [i for i in config.moe_blocks if not 0 <= i < config.depth]
    require(
        not outside,
        f"moe_blocks names block {outside[:1]}, but depth={config.depth} has blocks 0 to"
        f" {config.depth - 1}",
    )
    require(
        bool(config.moe_blocks) or config.moe_every == 0 or config.depth % config.moe_every == 0,
        f"moe_every={config.moe_every} does not divide depth={config.depth}; choose a divisor, or"
        " list the blocks in moe_blocks",
    )
    if config.moe.router in BASIS_ROUTERS:
        config.moe.basis.rank_of(config.width)


def moe_layers(config: LMConfig | ViTConfig) -> tuple[bool, ...]:
    """For each block, whether it has experts."""
    if config.moe_blocks:
        return tuple(i in config.moe_blocks for i in range(config.depth))
    every = config.moe_every
    return tuple(every > 0 and (i + 1) % every == 0 for i in range(config.depth))
