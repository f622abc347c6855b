"""Which attention backend runs a case: literal rules over static facts, in the order written.

A case is everything known before tracing. `auto` takes the platform's kernel unless a rule refuses the case, then XLA;
a backend asked for by name and refused is an error with the rule's remedy.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax

Backend = Literal["xla", "cudnn", "splash"]

TESTED_JAX = ("0.10", "0.11")
"""JAX versions the kernels were run on; on another, `auto` is XLA."""

MASK_LIMIT = 2**29
"""Elements of cuDNN's packing mask on one device: a bias in bfloat16, 1 GiB (JAX 0.10 adds its gradient)."""

SPLASH_BLOCKS = (512, 384, 256, 128)
"""Block lengths of the splash kernel, best first; a row's length has to be a multiple of one of them."""

KERNELS: dict[str, Backend] = {"gpu": "cudnn", "tpu": "splash"}


@dataclasses.dataclass(frozen=True)
class Case:
    """The static facts of one attention call."""

    platform: str
    dtype: str
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    aligned: bool = True
    """Queries and keys are the same tokens (self-attention), not new tokens against a cache."""
    causal: bool = True
    segments: bool = False
    window: int | None = None
    softcap: float | None = None
    prefix: bool = False
    """Keys and values of a prefix come before all segments."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability of the GPU; None where there is none."""
    batch_shards: int = 1
    head_shards: int = 1
    matmul_precision: str | None = None
    """`jax_default_matmul_precision`."""
    jax_version: str = jax.__version__


class Choice(NamedTuple):
    """The backend, the rule that decided, and whether it stands in for the platform's own kernel."""

    backend: Backend
    reason: str
    fell_back: bool


class Rule(NamedTuple):
    """A backend cannot do the cases where `refuses` holds."""

    refuses: Callable[[Case], bool]
    reason: str
    remedy: str


def splash_block(T: int) -> int | None:
    """The block a row of T tokens is cut into, or None where none divides it."""
    return next((b for b in SPLASH_BLOCKS if T % b == 0), None)


def _mask_elements(c: Case) -> int:
    return -(-c.batch // c.batch_shards) * c.queries * c.keys if c.segments else 0


def _cudnn_head_limit(c: Case) -> int:
    return 256 if c.capability is not None and c.capability >= (9, 0) else 128


_ALIGNED = Rule(
    lambda c: not c.aligned,
    "the keys are not the queries' own tokens",
    "use 'xla' with a cache; in self-attention give queries and keys one positions array and one segments array",
)

_NO_PREFIX = Rule(
    lambda c: c.prefix,
    "a prefix is merged by the log-sum-exp of the scores, whose gradient the kernel does not give",
    "use 'xla' with a prefix, or tune a prompt",
)

RULES: dict[Backend, tuple[Rule, ...]] = {
    "xla": (),
    "cudnn": (
        Rule(lambda c: c.platform != "gpu", "cuDNN needs a GPU", "use 'xla'"),
        Rule(
            lambda c: c.capability is None or c.capability < (8, 0),
            "cuDNN flash attention needs an NVIDIA GPU of compute capability 8.0 or later",
            "use 'xla' on this GPU",
        ),
        _ALIGNED,
        _NO_PREFIX,
        Rule(
            lambda c: c.dtype not in ("bfloat16", "float16"),
            "cuDNN flash attention is for bfloat16 and float16",
            "load the model with dtype=bfloat16",
        ),
        Rule(lambda c: c.softcap is not None, "cuDNN's entry in JAX has no soft-cap", "use 'xla'"),
        Rule(
            lambda c: c.head_dim % 8 != 0 or c.head_dim > _cudnn_head_limit(c),
            "cuDNN wants a head dimension that is a multiple of 8, at most 128 (256 from Hopper on)",
            "use 'xla' for this model",
        ),
        Rule(
            lambda c: c.window is not None and not c.causal,
            "cuDNN has a sliding window only with causal attention",
            "use 'xla'",
        ),
        Rule(
            lambda c: c.segments and c.queries % 2 != 0,
            "cuDNN's packing mask wants an even row length",
            "pad the rows to an even length",
        ),
        Rule(
            lambda c: _mask_elements(c) > MASK_LIMIT,
            f"the packing mask of these rows would pass {MASK_LIMIT} elements on one device",
            "use fewer or shorter rows, or data.packing=false",
        ),
    ),
    "splash": (
        # Not on "cpu": a CPU machine compiles ahead of time for a TPU by asking for the kernel by name.
        Rule(lambda c: c.platform == "gpu", "splash attention is a TPU kernel", "use 'cudnn' or 'xla'"),
        _ALIGNED,
        _NO_PREFIX,
        Rule(
            lambda c: c.dtype not in ("bfloat16", "float32"),
            "splash attention is for bfloat16 and float32",
            "load the model with dtype=bfloat16",
        ),
        Rule(
            lambda c: c.dtype == "bfloat16" and c.matmul_precision not in (None, "default", "fastest", "bfloat16"),
            "Mosaic does not compile the splash kernel in bfloat16 under a raised jax_default_matmul_precision",
            "leave jax_default_matmul_precision at its default",
        ),
        Rule(
            lambda c: splash_block(c.queries) is None,
            "splash attention wants rows of a multiple of 128 tokens",
            "pad the rows to a multiple of 128",
        ),
        Rule(
            lambda c: c.batch % c.batch_shards != 0,
            "splash attention wants the rows to divide among the devices that share them",
            "make the batch a multiple of the mesh's data and fsdp axes",
        ),
        Rule(
            lambda c: (
                c.heads % c.head_shards != 0 or (c.kv_heads % c.head_shards != 0 and c.head_shards % c.kv_heads != 0)
            ),
            "splash attention wants the heads to divide among the devices that share them",
            "choose a tensor axis that divides the model's heads",
        ),
    ),
}


def refusal(backend: Backend, case: Case) -> Rule | None:
    """The first rule by which `backend` cannot do `case`."""
    return next((rule for rule in RULES[backend] if rule.refuses(case)), None)


def choose(case: Case, backend: Literal["auto"] | Backend = "auto") -> Choice:
    """The backend for a case; raises ValueError where one asked for by name cannot do it."""
    if backend != "auto":
        if backend not in RULES:
            raise ValueError(f"attention backend: got {backend!r}, expected one of {('auto', *RULES)}")
        rule = refusal(backend, case)
        if rule is not None:
            raise ValueError(
                f"attention backend {backend!r} cannot do this case: {rule.reason}; got {case}. "
                f"Remedy: {rule.remedy}, or let backend='auto' choose."
            )
        return Choice(backend, "asked for", False)
    kernel = KERNELS.get(case.platform, "xla")
    if kernel == "xla":
        return Choice("xla", f"no kernel for platform {case.platform!r}", False)
    if not case.aligned:
        # Decoding reads its cache once: nothing to win. As many queries as keys is more likely a caller's oversight.
        return Choice("xla", f"{_ALIGNED.reason} (remedy: {_ALIGNED.remedy})", case.queries == case.keys > 1)
    if case.jax_version.rpartition(".")[0] not in TESTED_JAX:
        return Choice("xla", f"the {kernel} kernel is untested on this JAX version (tested: {TESTED_JAX})", True)
    rule = refusal(kernel, case)
    if rule is not None:
        return Choice("xla", f"{rule.reason} (remedy: {rule.remedy})", True)
    return Choice(kernel, f"the kernel of platform {case.platform!r}", False)
