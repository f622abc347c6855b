"""What every method must do on a whole model: one function a property, its docstring the property in words.

A check gets a `Trial`, a tiny random decoder with the method on it, and raises `Broken`.
"""

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxft import peft
from jaxft.core import tree
from jaxft.core import weight as weights
from jaxft.core.names import Names
from jaxft.models import decoder, families, init, slots
from jaxft.models.config import ModelConfig
from jaxft.models.decoder import Execution
from jaxft.objectives import OBJECTIVES
from jaxft.peft import disk, store
from jaxft.peft.disk import AdapterError
from jaxft.rollout import generate, score
from jaxft.rollout.generate import GenerateConfig
from jaxft.sharding import mesh as mesh_
from jaxft.sharding import rules
from jaxft.testing.claims import Broken, arrays, require, same
from jaxft.training import optim, state, step
from jaxft.training.config import OptimConfig

RAW = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "attention_bias": True,
}  # fmt: skip
DOCUMENTS = ((5, 17, 3, 44, 8), (21, 9, 60), (7, 7, 31, 12, 90, 2, 55))
LENGTH = 128
Batch = dict[str, Any]
MODEL = 1e-4
"""Tolerance of a whole model in float32."""


class Base(NamedTuple):
    """What `peft.adapt` reads of a model."""

    config: ModelConfig
    params: tree.Params
    names: Names
    tokenizer: Any = None


@functools.cache
def base() -> Base:
    """A decoder of two layers with random weights."""
    config, names = families.read(RAW)
    return Base(config, init.random(config, names, jax.random.key(0), jnp.float32, 0.2), names)


class Trial:
    """A method (or several in turn) on the tiny decoder, with what several checks need of it made once."""

    def __init__(self, methods: Any, identity: bool = True):
        self.methods = list(methods) if isinstance(methods, list | tuple) else [methods]
        self.identity = identity

    @functools.cached_property
    def fresh(self) -> tuple[tree.Params, tree.Params]:
        """(parameters, mask) at initialisation."""
        params, mask, _ = peft.adapt_for_training(base(), jax.random.key(1), self.methods)
        return params, mask

    @functools.cached_property
    def parts(self) -> tuple[tree.Params, tree.Params]:
        """(trainable, frozen) off the initialisation: after two steps of sign descent."""
        trainable, frozen = tree.partition(*self.fresh)
        for _ in range(2):
            grads = gradient(trainable, frozen, self.batch)
            trainable = jax.tree.map(lambda p, g: p - 0.03 * jnp.sign(g), trainable, grads)
        return trainable, frozen

    @functools.cached_property
    def params(self) -> tree.Params:
        """The parameters off the initialisation."""
        return tree.combine(*self.parts)

    @property
    def before(self) -> int:
        """Positions that a prompt takes before each document."""
        return slots.prompt_length(self.fresh[0])

    @functools.cached_property
    def batch(self) -> Batch:
        """Several documents in one row."""
        return packed(DOCUMENTS, self.before)


def packed(documents: Sequence[Sequence[int]], before: int) -> Batch:
    """All documents in one row [1, LENGTH], each after ``before`` reserved positions."""
    batch: Batch = {name: np.zeros((1, LENGTH), np.int32) for name in ("tokens", "positions", "segments")}
    batch["loss_mask"] = np.zeros((1, LENGTH), bool)
    at = 0
    for number, document in enumerate(documents, 1):
        stop = at + before + len(document)
        batch["tokens"][0, at + before : stop] = document
        batch["positions"][0, at:stop] = np.arange(stop - at)
        batch["segments"][0, at:stop] = number
        batch["loss_mask"][0, at + before + 1 : stop] = True
        at = stop
    return batch


@functools.partial(jax.jit, static_argnames="execution")
def logp(params: tree.Params, batch: Batch, execution: Execution = decoder.DEFAULT) -> jax.Array:
    """Log-probabilities float32[B, T] of the tokens that count, 0 elsewhere."""
    scored = score.make_score(base().config, dtype=jnp.float32, execution=execution)("policy", params, batch)
    return jnp.where(batch["loss_mask"], scored["logp"], 0.0)


@functools.partial(jax.jit, static_argnames="execution")
@functools.partial(jax.grad, argnums=0)
def gradient(
    trainable: tree.Params, frozen: tree.Params, batch: Batch, execution: Execution = decoder.DEFAULT
) -> jax.Array:
    """The gradient of minus the sum of a batch's log-probabilities, divided by 100."""
    return -jnp.sum(logp(tree.combine(trainable, frozen), batch, execution)) / 100.0


def starts_as_the_base(t: Trial) -> None:
    """Before training the adapted model is the base."""
    if t.identity:
        mine, bare = packed(DOCUMENTS, t.before), packed(DOCUMENTS, 0)
        got, want = logp(t.fresh[0], mine)[mine["loss_mask"]], logp(base().params, bare)[bare["loss_mask"]]
        same(got, want, "log-probabilities before training and of the base", MODEL)


def every_trained_array_has_a_gradient(t: Trial) -> None:
    """Off the initialisation every trained array has a finite gradient that is not zero."""
    for path, g in arrays(gradient(*t.parts, t.batch)).items():
        require(jnp.isfinite(g).all(), f"the gradient of {path} is not finite")
        require(jnp.any(g != 0), f"the gradient of {path} is zero: does the map use it?")


def stripped_is_the_base(t: Trial) -> None:
    """Stripped, the model is the base: training has touched none of its arrays."""
    if all(peft.method_of(m).select(m) is None for m in t.methods):  # else trained in place, by the user's wish
        same(tree.strip(t.params), base().params, "stripped and the base", 0)


def merged_is_the_model(t: Trial) -> None:
    """Merged into plain weights the model computes the same; or merging is refused by name."""
    try:
        merged = tree.merge(t.params)
    except weights.NotMergeable as error:
        named = any(name in str(error) for name in ("layers/", "embed", "head", "prompt", "prefix"))
        require(named, f"the refusal does not name the weight: {error}")
        return
    same(logp(merged, t.batch), logp(t.params, t.batch), "log-probabilities merged and not", MODEL)


def unrolled_and_rematerialised_agree(t: Trial) -> None:
    """Unrolled and rematerialised, the gradients are those of the plain scan."""
    trainable, frozen = t.parts
    got = gradient(trainable, tree.split_layers(frozen), t.batch, Execution(remat="save", unroll=True))
    same(got, gradient(trainable, frozen, t.batch), "gradients unrolled and rematerialised, and plain", MODEL)


def packing_changes_nothing(t: Trial) -> None:
    """Documents packed into one row have the log-probabilities they have alone."""
    together = logp(t.params, t.batch)
    for number, document in enumerate(DOCUMENTS, 1):
        alone = packed([document], t.before)
        mine = together[t.batch["loss_mask"] & (t.batch["segments"] == number)]
        same(mine, logp(t.params, alone)[alone["loss_mask"]], f"document {number} packed and alone", MODEL)


def accumulation_changes_nothing(t: Trial) -> None:
    """The training step over two micro-batches moves along the gradient of both together."""
    trainable, frozen = t.parts
    settings = OptimConfig(name="sgd", lr=1.0, clip_norm=None, warmup_steps=0, schedule="constant", betas=(0.0, 0.0))
    optimizer = optim.make(settings, trainable, 4)
    objective = OBJECTIVES["sft"]
    run = step.make_step(objective, objective.config(), score.make_score(base().config, dtype=jnp.float32), optimizer)
    rows = [packed(DOCUMENTS, t.before), packed(DOCUMENTS[:1], t.before)]
    batch: Batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    after, _ = run(state.create(trainable, optimizer, jax.random.key(2)), frozen, batch)
    counted = sum(row["loss_mask"].sum() for row in rows)
    first, second = (gradient(trainable, frozen, row) for row in rows)
    want = jax.tree.map(lambda p, a, b: p - 100.0 * (a + b) / counted, trainable, first, second)
    same(after.trainable, want, "a step over two micro-batches and the gradient of both", MODEL)


def generation_equals_recomputation(t: Trial) -> None:
    """The log-probabilities found while generating with a cache are those of one pass over the text."""
    settings = GenerateConfig(max_new_tokens=6, temperature=0.0)
    prompts = [list(DOCUMENTS[0]), list(DOCUMENTS[1])]
    for prompt, made in zip(prompts, generate.generate(base().config, t.params, prompts, settings, [1]), strict=True):
        batch = packed([[*prompt, *made.tokens]], t.before)
        want = logp(t.params, batch)[batch["loss_mask"]][-len(made.tokens) :]
        same(jnp.asarray(made.logp), want, "log-probabilities while generating and in one pass", MODEL)


def a_mesh_changes_nothing(t: Trial) -> None:
    """Sharded over fsdp and tensor axes, the gradients are those of one device. Needs four devices."""
    if len(jax.devices()) < 4:
        return
    devices = np.asarray(jax.devices()[:4]).reshape(1, 2, 2)
    mesh = Mesh(devices, mesh_.AXES, axis_types=(AxisType.Auto,) * 3)
    ours, theirs = tree.partition(rules.shardings(t.params, mesh), t.fresh[1])
    trainable, frozen = jax.device_put(t.parts[0], ours), jax.device_put(t.parts[1], theirs)
    twice = {name: np.concatenate([value, value]) for name, value in t.batch.items()}
    got = gradient(trainable, frozen, twice, Execution(mesh=mesh))
    want = jax.tree.map(lambda g: 2 * g, gradient(*t.parts, t.batch))
    same(got, want, "gradients on a mesh and on one device", MODEL)


def many_adapters_are_one_vmap(t: Trial) -> None:
    """Several sets of trained arrays run as one vmap on one base, each as it does alone."""
    trainable, frozen = t.parts
    many = jax.tree.map(lambda p: jnp.stack([p, p * 0.9]), trainable)
    got = jax.jit(jax.vmap(lambda p: logp(tree.combine(p, frozen), t.batch)))(many)
    for i in range(2):
        alone = logp(tree.combine(jax.tree.map(lambda p, i=i: p[i], many), frozen), t.batch)
        same(got[i], alone, f"adapter {i} in a vmap and alone", MODEL)


def saved_and_loaded_it_is_the_same(t: Trial) -> None:
    """Saved and loaded it is the same, bit for bit, and what only a training step needs is not stored."""
    if not tree.adapters(t.params):  # its arrays are those of a model, and saved as one
        return
    with tempfile.TemporaryDirectory() as folder:
        stored = _save(t, tree.dropout_keys(t.params, jax.random.key(3)), folder)
        loaded = store.load(base().params, base().names, base().config.num_layers, folder)
        want = tree.dropout_keys(t.params, None)
        if jax.tree.structure(loaded) == jax.tree.structure(want):
            same(loaded, want, "loaded and saved", 0)
        else:  # peft keeps what an encoder makes of its numbers, not the encoder
            same(logp(loaded, t.batch), logp(want, t.batch), "log-probabilities loaded and saved", MODEL)
            require(_save(t, loaded, folder) == stored, "loaded and saved again it is stored as other numbers")


def _save(t: Trial, params: tree.Params, folder: str) -> bytes:
    """The tensors of an adapter, as they are stored in ``folder``."""
    model, methods = base(), t.methods
    try:
        store.save(
            params, model.names, model.config.num_layers, folder, methods=methods, base=model.params, overwrite=True
        )
    except AdapterError as error:
        raise Broken(f"it cannot be saved: {str(error).replace(folder, 'the adapter')}") from None
    return (Path(folder) / disk.WEIGHTS).read_bytes()


CHECKS: tuple[Callable[[Trial], None], ...] = (
    starts_as_the_base,
    every_trained_array_has_a_gradient,
    stripped_is_the_base,
    merged_is_the_model,
    unrolled_and_rematerialised_agree,
    packing_changes_nothing,
    accumulation_changes_nothing,
    generation_equals_recomputation,
    a_mesh_changes_nothing,
    many_adapters_are_one_vmap,
    saved_and_loaded_it_is_the_same,
)
