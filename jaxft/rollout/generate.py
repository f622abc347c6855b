"""Generation: prompts padded on the left, one compiled loop over a fixed-size cache.

Prompt lengths and token budgets are rounded up to buckets, so that a run compiles a handful of programs. `generate`
runs a whole batch on the device; `stream` yields one token at a time for a terminal.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core import many, tree
from jaxft.models import cache as cache_
from jaxft.models import decoder, heads, slots
from jaxft.models.cache import Cache
from jaxft.models.config import ModelConfig
from jaxft.models.decoder import Execution
from jaxft.rollout import sample
from jaxft.rollout.sample import Sampling

BUCKET = 64


@dataclass(frozen=True)
class GenerateConfig:
    """How text is generated."""

    max_new_tokens: int = 256
    """Longest completion, in tokens."""
    temperature: float = 0.7
    """0 is greedy; higher is more varied."""
    top_k: int = 0
    """Draw from the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens whose probability reaches this."""
    seed: int = 0
    """Of the draws."""
    batch: int = 32
    """Prompts generated together."""

    def __post_init__(self) -> None:
        good = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "temperature": self.temperature >= 0.0,
            "top_k": self.top_k >= 0,
            "top_p": 0.0 < self.top_p <= 1.0,
            "batch": self.batch >= 1,
        }
        for field, fine in good.items():
            if not fine:
                expected = "max_new_tokens, batch >= 1; temperature, top_k >= 0; 0 < top_p <= 1"
                raise ValueError(f"generate.{field}: got {getattr(self, field)}; expected {expected}")

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature == 0.0, self.top_k, self.top_p)


class Completion(NamedTuple):
    """What one prompt gave: tokens (the end token included, if reached) and their log-probabilities, in nats."""

    tokens: list[int]
    logp: list[float]
    finished: bool
    """Whether an end token was drawn."""


class _Laid(NamedTuple):
    """Prompts padded on the left, as they are prefilled."""

    tokens_BT: Any
    segments_BT: Any
    tasks_BT: Any = None


class _Decoding(NamedTuple):
    cache: Cache | None
    token_B: jax.Array
    position_B: jax.Array
    done_B: jax.Array
    tokens_BN: jax.Array
    logp_BN: jax.Array
    count: jax.Array
    key: jax.Array


def generate(
    config: ModelConfig,
    params: tree.Params,
    prompts: Sequence[Sequence[int]],
    settings: GenerateConfig,
    end: Sequence[int],
    *,
    execution: Execution = decoder.DEFAULT,
    adapters: Sequence[int] | None = None,
    tasks: Sequence[int] | None = None,
) -> list[Completion]:
    """Completions of tokenised prompts, in order. ``end``: token ids that end a completion. ``adapters``: of stacked
    adapters (`core.many`), the one that each prompt uses.

    ``tasks``: the task of each prompt, where a multitask prompt was learnt; the first by default. Raises ValueError
    for an empty prompt, and for one that leaves no room within the model's positions (learned)."""
    _check(config, params, prompts, settings)
    if adapters is not None and len(adapters) != len(prompts):
        raise ValueError(f"generate: got {len(adapters)} adapters for {len(prompts)} prompts; expected one for each")
    out: list[Completion] = []
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(prompts), settings.batch):
        chosen = order[start : start + settings.batch]
        full = chosen + chosen[-1:] * (min(settings.batch, len(prompts)) - len(chosen))  # one compiled batch size
        rows, own = [prompts[i] for i in full], None if tasks is None else [tasks[i] for i in full]
        model = params if adapters is None else many.for_rows(params, [adapters[i] for i in full])
        key = jax.random.fold_in(jax.random.key(settings.seed), start)
        out += zip(chosen, _batch(config, model, rows, own, settings, end, execution, key), strict=False)  # type: ignore[arg-type]
    return [completion for _, completion in sorted(out, key=lambda pair: pair[0])]  # type: ignore[misc]


def pad_left(prompts: Sequence[Sequence[int]], length: int, reserved: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segments int32[B, length]; padding on the left has segment 0, ``reserved`` positions before the
    tokens have theirs."""
    tokens_BT = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, length - len(prompt) :] = prompt
    lengths_B1 = np.array([[len(p) + reserved] for p in prompts])
    return tokens_BT, (np.arange(length) >= length - lengths_B1).astype(np.int32)


def _laid(params: tree.Params, rows: Sequence[Sequence[int]], tasks: Sequence[int] | None) -> _Laid:
    """The prompts as one batch, room for a learnt one before each."""
    reserved = slots.prompt_length(params)
    tokens_BT, segments_BT = pad_left(rows, _bucket(max(len(r) for r in rows) + reserved), reserved)
    if tasks is None:
        return _Laid(tokens_BT, segments_BT)
    known = slots.tasks(params)
    if not all(0 <= task < known for task in tasks):
        raise ValueError(
            f"generate: got tasks {min(tasks)} to {max(tasks)}; the model has a prompt for {known} of them"
        )
    return _Laid(tokens_BT, segments_BT, np.repeat(np.array(tasks, np.int32)[:, None], tokens_BT.shape[1], axis=1))


def _batch(config, params, rows, tasks, settings: GenerateConfig, end, execution, key) -> list[Completion]:
    budget = settings.max_new_tokens
    laid = _laid(params, rows, tasks)
    temperature = jnp.float32(settings.temperature)
    ends = jnp.asarray(sorted(end), jnp.int32)
    made = _run(config, execution, settings.sampling, budget, params, laid, temperature, ends, key)
    tokens_BN, logp_BN, done_B, count = jax.device_get((made.tokens_BN, made.logp_BN, made.done_B, made.count))
    return [_cut(tokens_BN[i, :count], logp_BN[i, :count], bool(done_B[i]), set(end)) for i in range(len(rows))]


def _cut(tokens_N: np.ndarray, logp_N: np.ndarray, finished: bool, end: set[int]) -> Completion:
    stop = next((i + 1 for i, t in enumerate(tokens_N) if int(t) in end), len(tokens_N))
    return Completion(tokens_N[:stop].tolist(), logp_N[:stop].tolist(), finished)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(
    config: ModelConfig, execution: Execution, sampling: Sampling, budget: int,
    params: tree.Params, laid: _Laid, temperature: jax.Array, ends: jax.Array, key: jax.Array,
) -> _Decoding:  # fmt: skip
    """Prefill, then one token a turn until every row has ended or the budget is spent."""
    rows = laid.tokens_BT.shape[0]
    params = slots.computed(_uniform(params))
    logits_BV, cache, position_B = _prefill(config, execution, params, laid, budget)

    def choose(state: _Decoding, logits_BV: jax.Array) -> _Decoding:
        token_B, logp_B = sample.draw(sampling, jax.random.fold_in(state.key, state.count), logits_BV, temperature)
        tokens_BN = jax.lax.dynamic_update_index_in_dim(state.tokens_BN, token_B, state.count, 1)
        logp_BN = jax.lax.dynamic_update_index_in_dim(state.logp_BN, logp_B, state.count, 1)
        done_B = state.done_B | jnp.any(token_B[:, None] == ends[None], -1)
        return state._replace(
            token_B=token_B, done_B=done_B, tokens_BN=tokens_BN, logp_BN=logp_BN, count=state.count + 1
        )

    def turn(state: _Decoding) -> _Decoding:
        logits_BV, cache = _step(config, execution, params, state.token_B, state.position_B, state.cache)
        return choose(state._replace(cache=cache, position_B=state.position_B + 1), logits_BV)

    start = _Decoding(
        cache, jnp.zeros(rows, jnp.int32), position_B, jnp.zeros(rows, bool),
        jnp.zeros((rows, budget), jnp.int32), jnp.zeros((rows, budget)), jnp.int32(0), key,
    )  # fmt: skip
    more = lambda state: (state.count < budget) & ~jnp.all(state.done_B)  # noqa: E731
    return jax.lax.while_loop(more, turn, choose(start, logits_BV))._replace(cache={})


def _uniform(params: tree.Params) -> tree.Params:
    """The model in the dtype of its embedding: what was trained in place is float32, whatever the rest."""
    return tree.cast(params, params["embed"]["tokens"].dtype)


def _prefill(config, execution, params, laid: _Laid, budget: int):
    """(logits_BV after the prompt, cache with room for ``budget`` more, next position int32[B])."""
    positions_BT = jnp.maximum(jnp.cumsum(laid.segments_BT, axis=1) - 1, 0).astype(jnp.int32)
    params, dtype = _uniform(params), params["embed"]["tokens"].dtype
    rows, length = laid.tokens_BT.shape
    cache = cache_.create(config, rows, length + budget, dtype)
    hidden_BTD, cache, _ = decoder.forward(
        config, params, laid.tokens_BT, positions_BT, laid.segments_BT, cache,
        execution=execution, tasks_BT=laid.tasks_BT,
    )  # fmt: skip
    logits_BV = heads.logits(config, heads.head_of(config, params), hidden_BTD[:, -1])
    return logits_BV, cache, positions_BT[:, -1] + 1


def _step(config, execution, params, token_B, position_B, cache):
    """(logits_BV, cache) after one more token in each row."""
    params = _uniform(params)
    hidden_B1D, cache, _ = decoder.forward(
        config, params, token_B[:, None], position_B[:, None], None, cache, execution=execution
    )
    return heads.logits(config, heads.head_of(config, params), hidden_B1D[:, 0]), cache


_prefill_once = jax.jit(_prefill, static_argnums=(0, 1, 4))
_step_once = jax.jit(_step, static_argnums=(0, 1), donate_argnums=5)
_draw_once = jax.jit(sample.draw, static_argnums=0)


def stream(
    config: ModelConfig,
    params: tree.Params,
    prompt: Sequence[int],
    settings: GenerateConfig,
    end: Sequence[int],
    *,
    execution: Execution = decoder.DEFAULT,
) -> Iterator[int]:
    """The completion's tokens one by one, the end token included if it is reached."""
    _check(config, params, [prompt], settings)
    laid, budget = _laid(params, [prompt], None), _bucket(settings.max_new_tokens)
    params = slots.computed(params)
    logits_BV, cache, position_B = _prefill_once(config, execution, params, laid, budget)
    key = jax.random.key(settings.seed)
    for count in range(settings.max_new_tokens):
        turn = jax.random.fold_in(key, count)
        token_B, _ = _draw_once(settings.sampling, turn, logits_BV, jnp.float32(settings.temperature))
        token = int(token_B[0])
        yield token
        if token in end:
            return
        logits_BV, cache = _step_once(config, execution, params, token_B, position_B, cache)
        position_B = position_B + 1


def _bucket(length: int) -> int:
    return -(-length // BUCKET) * BUCKET


def _check(
    config: ModelConfig, params: tree.Params, prompts: Sequence[Sequence[int]], settings: GenerateConfig
) -> None:
    empty = [i for i, p in enumerate(prompts) if len(p) == 0]
    if empty or not prompts:
        raise ValueError(f"generate: prompt {empty[0] if empty else 0} is empty; expected at least one token")
    virtual = slots.prompt_length(params) + slots.prefix_length(params)
    longest = max(len(p) for p in prompts) + settings.max_new_tokens + virtual
    if config.learned_positions and longest > config.max_positions:
        raise ValueError(
            f"generate: {longest} positions (prompt and generate.max_new_tokens"
            f"{' and what is learnt before them' if virtual else ''}) are needed and the model has "
            f"{config.max_positions}; shorten the prompt or lower generate.max_new_tokens"
        )


def ends_of(raw: dict[str, Any], generation: dict[str, Any], tokenizer: Any) -> list[int]:
    """Ids that end a completion: of the generation config, else of config.json, and the tokenizer's own."""
    listed = generation.get("eos_token_id", raw.get("eos_token_id"))
    ids = set(listed if isinstance(listed, list) else [] if listed is None else [listed])
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return sorted(ids)
