r"""LoRA: a frozen weight plus a trained low-rank product.

.. math:: y = x W + s\,(x A) B, \qquad s = \alpha / r \ \text{ or } \ \alpha / \sqrt{r} \ (\text{rsLoRA})

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3 (arXiv:2106.09685); the scale of rank
stabilised LoRA: Kalajdzievski 2023, eq. 9 (arXiv:2312.03732); a higher learning rate for B, LoRA+: Hayou et al. 2024,
section 4 (arXiv:2402.12354). r (in + out) parameters, and out more with ``lora_bias``. ``A`` is stored [in, r] and
``B`` [r, out], transposed from torch. Layers are stacked, so ranks that differ by layer are padded with zeros to the
largest (zero columns of A against zero rows of B have zero gradients and never move) and a layer that is not adapted
has scale 0.

Unusual: initialisations that take a first product s A0 B0 out of W (PiSSA, OLoRA, CorDA) leave W as it is. peft stores
the residual W - s A0 B0 in its place; here A0 and B0 stay beside it, frozen: :math:`y = x W + s (x A) B - s (x A_0)
B_0`, the same map for one more product of rank r. So the base is still the base: no second copy of it, no rounding of
the residual, `strip` gives it back, many adapters share it, and a saved adapter is a plain one of rank 2r on it (what
peft's ``path_initial_model_for_weight_conversion`` writes). Only LoftQ, which is about a quantised base, replaces it.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxft.core import products, verbs
from jaxft.core.weight import Affine, Untied, Weight, is_packed, parameter, static, trainable, weight
from jaxft.peft import lora_data, lora_init
from jaxft.peft.calibration import Calibration
from jaxft.peft.lora_data import EVA, CorDA
from jaxft.peft.lora_init import LoftQ
from jaxft.peft.sites import Site, Targeted

Dot = Callable[[jax.Array, Any], jax.Array]
Each = Callable[[jax.Array], jax.Array]
Init = Literal[
    "kaiming", "gaussian", "a_zero", "random", "orthogonal", "pissa", "qpissa", "olora", "loftq", "eva", "corda"
]


@dataclass(frozen=True)
class LoRA(Targeted):
    """Low-rank adaptation. Default learning rate 2e-4."""

    rank: int = 16
    """Rank r of the update."""
    alpha: float | None = None
    """Numerator of the scale; default: twice the rank."""
    dropout: float = 0.0
    """Probability of zeroing an input feature of the adapter while training."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    init: Init = "kaiming"
    """How A and B begin. With a product of zero: kaiming (A uniform within 1/sqrt(in), B zero), gaussian (A normal with
    deviation 1/rank, B zero), a_zero (A zero, B uniform within 1/sqrt(rank)), orthogonal (neither zero; even ranks),
    eva (A from the inputs that the data give). Taken out of the weight: pissa (largest singular values), olora (QR),
    corda (what matters most to the data). With a base in few bits (quant), to lose less by that: loftq (A and B are
    what quantisation lost), qpissa (pissa, and what it leaves is quantised). random: both uniform, no identity."""
    pissa_iterations: int | None = None
    """Subspace iterations of a fast randomised decomposition for pissa, qpissa, and loftq on a base in few bits; 16 are
    plenty. Default: an exact one."""
    qpissa_turns: int = 1
    """With init=qpissa: turns of decomposing and quantising; the paper's best results take 5."""
    loftq: LoftQ = dataclasses.field(default_factory=LoftQ)
    """Settings of init=loftq."""
    eva: EVA = dataclasses.field(default_factory=EVA)
    """Settings of init=eva."""
    corda: CorDA = dataclasses.field(default_factory=CorDA)
    """Settings of init=corda."""
    calibration_batches: int = 8
    """Training batches that eva and corda look at."""
    lora_bias: bool = False
    """Whether B has a bias."""
    lora_plus: float = 1.0
    """Learning rate of B over that of A (LoRA+; 16 is usual). Of embeddings both keep the same."""
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    """Ranks that differ: a regex for the end of a module name to its rank."""
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    """Alphas that differ, likewise."""

    embeddings: ClassVar[bool] = True
    patterns: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")

    def __post_init__(self) -> None:
        right = {
            "rank": (self.rank >= 1, "at least 1"),
            "dropout": (0.0 <= self.dropout < 1.0, "a share below 1"),
            "init": (self.init in get_args(Init), f"one of {', '.join(get_args(Init))}"),
            "qpissa_turns": (self.qpissa_turns >= 1, "at least 1"),
            "calibration_batches": (self.calibration_batches >= 1, "at least 1"),
            "lora_plus": (self.lora_plus > 0.0, "a positive ratio"),
        }
        for field, (good, expected) in right.items():
            if not good:
                raise ValueError(f"peft.{field}: got {getattr(self, field)!r}; expected {expected}")

    def wrap(self, site: Site) -> "LoRAWeight":
        return LoRAWeight(**self.fields(site))

    def fields(self, site: Site) -> dict[str, Any]:
        """The fields of a LoRAWeight at its initialisation."""
        embedding = site.name.kind == "embedding"
        if embedding and self.lora_bias:
            raise ValueError(f"peft.lora_bias: {site.name.module} is an embedding, which has none; leave it out")
        ranks = site.values(self.rank, self.rank_pattern, np.int32)
        alphas = site.values(2.0 * self.rank if self.alpha is None else self.alpha, self.alpha_pattern)
        if self.init == "eva" and not embedding:
            moved = _statistics(site, self.init).ranks
            alphas = alphas * moved / np.maximum(ranks, 1) if self.eva.adjust_alpha else alphas
            ranks = moved
        scale = scales(ranks, alphas, self.rslora)
        return {
            **_start(self, site, ranks, scale),
            "scale": jnp.asarray(scale),
            "rank": jnp.asarray(ranks),
            "bias": jnp.zeros((*site.base.shape[:-2], site.base.shape[-1])) if self.lora_bias else None,
            "rate": 0.0 if embedding else self.dropout,
            "rslora": self.rslora,
            "lookup": embedding,
            "tied": site.follows,
        }


def _init_at(config: LoRA, site: Site) -> str:
    """The initialisation at one site. ``simulated``: loftq where no weight of the model is packed.

    Raises ValueError for what asks for a packed base and has none, or for bits of a base that has its own."""
    init, base = config.init, site.base
    if site.name.kind == "embedding" or init not in ("loftq", "qpissa"):
        return "embedding" if site.name.kind == "embedding" else init
    if is_packed(base):
        if init == "loftq" and config.loftq.bits is not None:
            raise ValueError(
                f"peft.loftq.bits: got {config.loftq.bits}; {site.name.module} is stored in few bits already "
                f"({base!r}): leave it out"
            )
        return init
    if site.original is not None and not isinstance(base, Weight):
        return {"loftq": "kaiming", "qpissa": "pissa"}[init]  # left out of quantisation, which loses nothing here
    if init == "qpissa":
        raise ValueError(
            f"peft.init: qpissa quantises what pissa leaves of {site.name.module}, whose base is no weight in few bits "
            "here; expected one: quant.method=nf4, or jaxft.load(path, quantize=...). Otherwise use pissa; in a list "
            "of methods put qpissa first."
        )
    return "simulated"


def _start(config: LoRA, site: Site, ranks: np.ndarray, scale: np.ndarray) -> dict[str, Any]:
    """The base, the factors, what of them is taken out of the base, and what made the base anew."""
    init = _init_at(config, site)
    if init in ("embedding", "kaiming", "gaussian", "a_zero", "random"):
        a, b = lora_init.drawn(site.key, site.base.shape, ranks, init)
        return {"base": site.base, "a": a, "b": b}
    if init == "eva":
        a = _statistics(site, init).vectors
        return {"base": site.base, "a": a, "b": jnp.zeros((*a.shape[:-2], a.shape[-1], site.shape[1]))}
    if init == "orthogonal":
        a, b = lora_init.orthogonal(site, ranks)
        return {"base": site.base, "a": a, "b": b}
    if init == "simulated":
        base, a, b = lora_init.quantised(site, ranks, scale, config.loftq)
        return {"base": base, "a": a, "b": b, "loftq": (config.loftq.bits or 4, config.loftq.iterations)}
    if init in ("loftq", "qpissa"):
        turns = config.loftq.iterations if init == "loftq" else config.qpissa_turns
        base, a, b = lora_init.packed(site, ranks, scale, init, turns, config.pissa_iterations)
        return {"base": base, "a": a, "b": b}

    def taken(index: tuple[int, ...], key: jax.Array, w: jax.Array, rank: int) -> lora_init.Pair:
        if init == "pissa":
            return lora_init.pissa(key, w, rank, scale[index], config.pissa_iterations)
        if init == "olora":
            return lora_init.olora(w, rank)
        covariance = _statistics(site, init)[index]
        return lora_data.corda(w, covariance, rank, scale[index], config.corda.method)

    a, b = lora_init.factors(site, ranks, taken)
    return {"base": site.base, "a": a, "b": b, "a0": a + 0, "b0": b + 0}  # buffers of their own: a and b are donated


def _statistics(site: Site, init: str) -> Any:
    if site.statistics is None:
        raise ValueError(
            f"peft.init: {init} begins from what the data show, and nothing was measured for {site.name.path}; "
            "expected statistics = jaxft.peft.calibrate(model, batches, config), then adapt(..., statistics=statistics)"
        )
    return site.statistics


def calibration(config: LoRA) -> Calibration | None:
    """What a data-driven initialisation asks of the inputs; None for the others."""
    if config.init == "eva":
        solve = functools.partial(
            lora_data.directions, config=config.eva, rank=config.rank, rank_pattern=config.rank_pattern
        )
        return Calibration(solve, loss_only=config.eva.loss_only)
    return Calibration(lora_data.covariances, scaled=True) if config.init == "corda" else None


def groups(config: LoRA) -> dict[str, float]:
    """LoRA+: the learning rate of B, and as in peft of its bias and of DoRA's lengths."""
    return {} if config.lora_plus == 1.0 else {r"^(?!embed/).*(^|/)(b|bias|magnitude)(/\d+)?$": config.lora_plus}


@weight
class LoRAWeight(Weight):
    """``x @ base + scale * (x @ a) @ b``. a: [*stack, in, r]; b: [*stack, r, out]; scale, rank: [*stack].

    ``bias`` [*stack, out] is added to B's output, before the scale. ``a0``, ``b0``: what the factors were when they
    were taken out of the base. ``lookup``: whether the base is an embedding. ``tied``: as in InPlace, whether a head
    tied to it follows the adapter; None if no head is tied to it. ``loftq``: (bits, iterations) that made the base.
    """

    base: Any = parameter()
    a: jax.Array = trainable()
    b: jax.Array = trainable()
    scale: jax.Array
    rank: jax.Array
    bias: Any = trainable(default=None)
    a0: Any = None
    b0: Any = None
    key: jax.Array | None = None
    rate: float = static(default=0.0)
    rslora: bool = static(default=False)
    lookup: bool = static(default=False)
    tied: bool | None = static(default=None)
    loftq: tuple[int, int] | None = static(default=None)

    noted: ClassVar[tuple[str, ...]] = ("rate", "rslora")

    @property
    def adapted(self):
        return self.rank > 0

    def off(self):
        return dataclasses.replace(self, scale=jnp.zeros_like(self.scale), rank=jnp.zeros_like(self.rank))

    @property
    def _b(self) -> jax.Array:
        """B as the products see it."""
        return self.b

    def _low_rank(self, x: jax.Array, a: jax.Array, b: jax.Array, dot: Dot, each: Each) -> jax.Array:
        """``scale * (x @ a) @ b`` in the dtype of x."""
        return dot(self._narrow(x, a, dot, each), b.astype(x.dtype))

    def _narrow(self, x: jax.Array, a: jax.Array, dot: Dot, each: Each) -> jax.Array:
        """``scale * (x @ a)``: the scale is applied at rank width, where it is cheap."""
        # Named so that rematerialisation can keep it: at rank width it costs little.
        z = checkpoint_name(dot(x, a.astype(x.dtype)), "adapter")
        return z * each(self.scale[..., None]).astype(x.dtype)

    def _frozen(self, x: jax.Array, dot: Dot, each: Each) -> jax.Array:
        """``x`` times the base, less what was taken out of it."""
        y = dot(x, self.base)
        return y if self.a0 is None else y - self._low_rank(x, self.a0, self.b0, dot, each)

    def _delta(self, x: jax.Array, dot: Dot, each: Each) -> jax.Array:
        y = self._low_rank(x, self.a, self._b, dot, each)
        return y if self.bias is None else y + each(self._constant()).astype(x.dtype)

    def _constant(self) -> jax.Array:
        return self.scale[..., None] * self.bias

    def _apply(self, x: jax.Array, dot: Dot, each: Each) -> jax.Array:
        """The map in terms of ``dot(x, w)``, a product with a matrix, and ``each(v)``, a vector for every row of x."""
        if dot is operator.matmul and self.a0 is None and self.bias is None and is_packed(self.base):
            z = self._narrow(self._dropped(x), self.a, dot, each)
            return self.base.plus(x, z, self._b.astype(x.dtype))
        return self._frozen(x, dot, each) + self._delta(self._dropped(x), dot, each)

    def _dropped(self, x: jax.Array) -> jax.Array:
        """The adapter's own input: features dropped while training, the same as ``x`` in evaluation."""
        return products.dropped(x, self.key, self.rate)

    def __rmatmul__(self, x):
        return self._apply(x, operator.matmul, lambda v: v if v.ndim == 1 else v[..., None, :])

    def take(self, ids):
        rows = verbs.take(self.base, ids)
        low = self.a[ids].astype(self.scale.dtype) * self.scale
        return rows + (low @ self._b.astype(low.dtype)).astype(rows.dtype)

    def unembed(self, x):
        y = verbs.unembed(self.base, x)
        if not self.tied:
            return y
        low = self._dropped(x) @ self._b.astype(x.dtype).T
        return y + (low * self.scale.astype(x.dtype)) @ self.a.astype(x.dtype).T

    def ragged_dot(self, x, group_sizes):
        def each(v: jax.Array) -> jax.Array:
            return jnp.repeat(v, group_sizes, axis=0, total_repeat_length=x.shape[0])

        return self._apply(x, lambda x, w: verbs.ragged_dot(x, w, group_sizes), each)

    def _matrix(self) -> jax.Array:
        """The dense weight in float32."""
        scale, w = self.scale[..., None, None], verbs.dense(self.base).astype(jnp.float32)
        w = w + jnp.matmul(self.a * scale, self._b, precision="highest")
        if self.a0 is not None:
            w = w - jnp.matmul(self.a0 * scale, self.b0, precision="highest")
        return w

    def dense(self):
        return self._matrix().astype(self.dtype)

    def merged(self):
        if self.tied is False:
            return Untied(self.dense(), self.base)
        return self.dense() if self.bias is None else Affine(self.dense(), self._constant().astype(self.dtype))

    def axes(self, names):
        stack, (rows, columns) = names[:-2], names[-2:]
        a, b = (*stack, rows, None), (*stack, None, columns)
        own = {"a": a, "b": b, "a0": a, "b0": b, "bias": (*stack, columns)}
        return {"base": names, **own, "scale": stack, "rank": stack, "key": stack}


def scales(ranks: np.ndarray, alphas: np.ndarray, rslora: bool) -> np.ndarray:
    """float32: alpha / rank, or alpha / sqrt(rank); 0 where the rank is 0 (a layer that is not adapted)."""
    divisor = np.maximum(np.sqrt(ranks) if rslora else ranks, 1)
    return np.where(ranks > 0, alphas / divisor, 0.0).astype(np.float32)
