"""Generation: prompts in, completions out, by an engine that decodes many rows together (`engine`).

`generate` completes a list of prompts, as many at a time as asked for; `stream` yields one completion's tokens one by
one for a terminal. What is compiled depends on the number of rows and the longest prompt, rounded up.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core import indexed, many, tree
from jaxft.models import decoder, slots
from jaxft.models.config import ModelConfig
from jaxft.models.decoder import Execution
from jaxft.rollout import decode, few
from jaxft.rollout.decode import Plan
from jaxft.rollout.engine import Engine, Request, Stop
from jaxft.rollout.sample import Knobs, Sampling
from jaxft.sharding import mesh as mesh_

UNROLLED = 32
"""Layers that generation on a CPU unrolls, at most."""

KEYS = "threefry2x32"
"""The random numbers of draws, whatever the rest of the program uses: a seed means the same everywhere."""


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
    """Prompts generated together: as one ends, the next takes its place."""
    min_p: float = 0.0
    """Draw from tokens at least this likely, relative to the most likely; 0: all."""
    repetition_penalty: float = 1.0
    """Makes what occurred in prompt or completion less likely (above 1)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the completion has."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens as many times as the completion has them."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, besides the end tokens."""

    def __post_init__(self) -> None:
        good = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "temperature": self.temperature >= 0.0,
            "top_k": self.top_k >= 0,
            "top_p": 0.0 < self.top_p <= 1.0,
            "batch": self.batch >= 1,
            "min_p": 0.0 <= self.min_p < 1.0,
            "repetition_penalty": self.repetition_penalty > 0.0,
            "stop": all(self.stop),
        }
        for field, fine in good.items():
            if not fine:
                expected = (
                    "max_new_tokens, batch >= 1; temperature, top_k >= 0; 0 < top_p <= 1; 0 <= min_p < 1; "
                    "repetition_penalty > 0; no empty stop text"
                )
                raise ValueError(f"generate.{field}: got {getattr(self, field)}; expected {expected}")

    @property
    def sampling(self) -> Sampling:
        penalties = self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
        greedy = self.temperature == 0.0
        chosen = (self.top_k > 0, self.top_p < 1.0, self.min_p > 0.0)
        top_k, top_p, min_p = (not greedy and one for one in chosen)
        return Sampling(greedy, top_k, top_p, min_p, penalties)

    @property
    def knobs(self) -> Knobs:
        names = ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        rest = (jnp.float32(getattr(self, name)) for name in names)
        return Knobs(jnp.float32(self.temperature), jnp.int32(self.top_k), *rest)


class Completion(NamedTuple):
    """What one prompt gave: tokens (the end token included, if reached) and their log-probabilities, in nats."""

    tokens: list[int]
    logp: list[float]
    """Under the distribution that they were drawn from; greedy: the policy's own."""
    finished: bool
    """Whether an end token was drawn, or a stop text reached."""
    policy_logp: list[float]
    """Under the policy's own distribution: no temperature, filter or penalty."""


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
    samples: int = 1,
    seeds: Sequence[int] | None = None,
    tokenizer: Any = None,
    merge: bool = False,
) -> list[Completion]:
    """Completions of tokenised prompts, in order.

    Args:
      end: token ids that end a completion.
      adapters: of stacked adapters (`core.many`), the one that each prompt uses.
      tasks: the task of each prompt, where a multitask prompt was learnt; the first by default.
      samples: completions of each prompt, which is read once for all: one after the other in what is returned.
      seeds: one a prompt; what is drawn then depends on that, not on the prompt's place. Default: ``settings.seed``.
      tokenizer: finds ``settings.stop``.
      merge: whether adapters are worked into a copy of the weights where they can be: each token then takes less time,
        and log-probabilities differ from the adapted model's by rounding.

    Raises ValueError for a prompt that is empty, has tokens that the model has not, or leaves no room within its
    positions (learned)."""
    if samples < 1:
        raise ValueError(f"generate: got {samples} samples of each prompt; expected at least 1")
    _check(config, params, prompts, settings)
    for what, given in (("adapters", adapters), ("tasks", tasks), ("seeds", seeds)):
        if given is not None and len(given) != len(prompts):
            raise ValueError(f"generate: got {len(given)} {what} for {len(prompts)} prompts; expected one for each")
    _check_tasks(params, tasks)
    if adapters is not None:
        many.for_rows(params, adapters)  # refuses those that are not there
    if merge and few.merges(params):
        params = few.merged(params)
    if execution.mesh is None and few.able(params):
        config, params = few.prepared(config, params)
    longest = max(map(len, prompts)) + settings.max_new_tokens
    about = (longest, len(prompts) * samples, adapters is not None, stops(tokenizer, settings.stop))
    made = _engine(config, params, settings, end, execution, *about)
    keys = _keys(settings.seed, seeds, len(prompts), samples)
    adapters = [-1] * len(prompts) if adapters is None else adapters
    tasks = [0] * len(prompts) if tasks is None else tasks
    requests = [
        Request(i, prompt, settings.max_new_tokens, list(keys[i]), adapters[i], tasks[i])
        for i, prompt in enumerate(prompts)
    ]
    out: dict[int, Completion] = {}
    for done in made.run(requests):
        said = Completion(done.tokens, done.logp, done.finished, done.policy_logp)
        out[done.request.number * samples + done.which] = said
    return [out[i] for i in range(len(prompts) * samples)]


def stream(
    config: ModelConfig,
    params: tree.Params,
    prompt: Sequence[int],
    settings: GenerateConfig,
    end: Sequence[int],
    *,
    execution: Execution = decoder.DEFAULT,
    tokenizer: Any = None,
) -> Iterator[int]:
    """The completion's tokens one by one, the end token included if it is reached."""
    _check(config, params, [prompt], settings)
    about = (len(prompt) + settings.max_new_tokens, 1, False, stops(tokenizer, settings.stop))
    made = _engine(config, params, settings, end, execution, *about)
    keys = _keys(settings.seed, None, 1, 1)
    yield from made.tokens(Request(0, prompt, settings.max_new_tokens, list(keys[0])))


def stops(tokenizer: Any, texts: Sequence[str]) -> Stop | None:
    """Recognises ``texts`` in what was made; None for none of them. Raises ValueError without a tokenizer."""
    if not texts:
        return None
    if tokenizer is None:
        raise ValueError(f"generate.stop: got {list(texts)} and no tokenizer to find them with; give tokenizer=")

    def stop(tokens: Sequence[int]) -> int | None:
        said = lambda n: tokenizer.decode(tokens[:n], skip_special_tokens=True, clean_up_tokenization_spaces=False)  # noqa: E731
        holds = lambda n: any(text in said(n) for text in texts)  # noqa: E731
        if not holds(len(tokens)):
            return None
        low, high = 1, len(tokens)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle + 1, high)
        return low

    return stop


def cut(text: str, texts: Sequence[str]) -> str:
    """What stands before the first of ``texts``."""
    return text[: min((at for stop in texts if (at := text.find(stop)) >= 0), default=len(text))]


def _engine(
    config: ModelConfig, params: tree.Params, settings: GenerateConfig, end: Sequence[int], execution: Execution,
    longest: int, samples: int, stacked: bool, stop: Stop | None,
) -> Engine:  # fmt: skip
    if jax.default_backend() == "cpu" and config.num_layers <= UNROLLED and not _looked_up(params):
        execution = dataclasses.replace(execution, unroll=True)  # a scan copies the cache in every layer there
    shards = mesh_.row_shards(execution.mesh)
    rows = -(-min(settings.batch, samples) // shards) * shards
    page = decode.page_of()
    longest += slots.prompt_length(params) + slots.prefix_length(params)
    width = -(-_rounded(longest) // page)
    each = rows // shards
    plan = Plan(config, execution, settings.sampling, rows, shards, page, width, each * (width + 1), stacked)
    return Engine(plan, params, settings.knobs, end, stop)


def _looked_up(params: tree.Params) -> bool:
    """Whether a scan reads packed layers where they lie."""
    return any(map(indexed.is_indexed, jax.tree.leaves(indexed.in_place(params["layers"]), is_leaf=indexed.is_indexed)))


def _rounded(length: int) -> int:
    """A little longer, so that few lengths are compiled."""
    step = max(64, 1 << max(length.bit_length() - 3, 0))
    return -(-length // step) * step


def _keys(seed: int, seeds: Sequence[int] | None, prompts: int, samples: int) -> np.ndarray:
    """Key data uint32[prompts, samples, 2]."""
    own = None if seeds is None else jnp.asarray(np.array([int(one) & 0xFFFFFFFF for one in seeds], np.uint32))
    made = _each_key(jnp.uint32(seed & 0xFFFFFFFF), own, prompts, samples)
    return np.asarray(jax.random.key_data(made))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _each_key(seed: jax.Array, seeds: jax.Array | None, prompts: int, samples: int) -> jax.Array:
    first = jax.random.key(seed, impl=KEYS)
    if seeds is None:
        each = jax.vmap(lambda i: jax.random.fold_in(first, i))(jnp.arange(prompts))
    else:
        each = jax.vmap(lambda s: jax.random.key(s, impl=KEYS))(seeds)
    return jax.vmap(lambda key: jax.vmap(lambda j: jax.random.fold_in(key, j))(jnp.arange(samples)))(each)


def _check(
    config: ModelConfig, params: tree.Params, prompts: Sequence[Sequence[int]], settings: GenerateConfig
) -> None:
    empty = [i for i, p in enumerate(prompts) if len(p) == 0]
    if empty or len(prompts) == 0:
        raise ValueError(f"generate: prompt {empty[0] if empty else 0} is empty; expected at least one token")
    for i, prompt in enumerate(map(np.asarray, prompts)):
        if (wrong := prompt[(prompt < 0) | (prompt >= config.vocab_size)]).size:
            raise ValueError(
                f"generate: prompt {i}: got the token {wrong[0]}; expected those of the model, 0 to "
                f"{config.vocab_size - 1}"
            )
    virtual = slots.prompt_length(params) + slots.prefix_length(params)
    longest = max(len(p) for p in prompts) + settings.max_new_tokens + virtual
    if config.learned_positions and longest > config.max_positions:
        raise ValueError(
            f"generate: {longest} positions (prompt and generate.max_new_tokens"
            f"{' and what is learnt before them' if virtual else ''}) are needed and the model has "
            f"{config.max_positions}; shorten the prompt or lower generate.max_new_tokens"
        )


def _check_tasks(params: tree.Params, tasks: Sequence[int] | None) -> None:
    known = slots.tasks(params)
    if tasks is not None and not all(0 <= task < known for task in tasks):
        raise ValueError(
            f"generate: got tasks {min(tasks)} to {max(tasks)}; the model has a prompt for {known} of them"
        )


def ends_of(raw: dict[str, Any], generation: dict[str, Any], tokenizer: Any) -> list[int]:
    """Ids that end a completion: of the generation config, else of config.json, and the tokenizer's own."""
    listed = generation.get("eos_token_id", raw.get("eos_token_id"))
    ids = set(listed if isinstance(listed, list) else [] if listed is None else [listed])
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return sorted(ids)
