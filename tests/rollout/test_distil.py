"""A student scored beside its teacher: against both models' plain logits, document by document."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft import peft
from jaxft.core import tree
from jaxft.models import decoder, families, heads, init
from jaxft.models.decoder import Execution
from jaxft.models.divergences import Divergence
from jaxft.objectives import OBJECTIVES, Distil
from jaxft.rollout import distil, score, topk
from jaxft.testing import jaxprs
from jaxft.training import optim, state, step
from jaxft.training.config import OptimConfig
from jaxft.training.step import Models

V = 53
SIZES = {"vocab_size": V, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
STUDENT = {"model_type": "llama", **SIZES, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEACHER = {"model_type": "gemma2", **SIZES, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 4,
           "sliding_window": 3, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
           "query_pre_attn_scalar": 8, "tie_word_embeddings": True}  # fmt: skip
PAIRS = ((0, 1), (-1, -2))
ALL = ("divergence", "logp", "hidden")
HOW = Divergence("jsd", beta=0.3, temperature=1.5)
LENGTHS = ((5, 7), (1, 9))
T = 14


class Host:
    """A random model, as methods are given one."""

    def __init__(self, raw, seed, scale=0.2):
        self.config, self.names = families.read(raw)
        self.params = init.random(self.config, self.names, jax.random.key(seed), jnp.float32, scale)


@functools.cache
def both():
    """(student with LoRA that is not the identity and projections, teacher)"""
    student, teacher = Host(STUDENT, 0), Host(TEACHER, 1)
    params = peft.adapt(student, jax.random.key(2), peft.LoRA(rank=2))
    params = distil.project(params, student.config, teacher.config, PAIRS, jax.random.key(3))
    student.params = jax.tree.map(lambda t, a: a + 0.05 if t else a, tree.trainable_mask(params), params)
    return student, teacher


def rows(lengths=LENGTHS, width=T, seed=0):
    """Packed rows, the second half of each document its targets."""
    rng, B = np.random.default_rng(seed), len(lengths)
    out = {name: np.zeros((B, width), np.int32) for name in ("positions", "segments")}
    out["tokens"], out["loss_mask"] = rng.integers(1, V, (B, width)).astype(np.int32), np.zeros((B, width), bool)
    for row, many in enumerate(lengths):
        for number, (start, length) in enumerate(zip(np.cumsum((0, *many)), many, strict=False)):
            here = slice(start, start + length)
            out["positions"][row, here], out["segments"][row, here] = np.arange(length), number + 1
            out["loss_mask"][row, start + (length + 1) // 2 : start + length] = True
    return out


def scorer(needs=ALL, divergence=HOW, **more):
    student, teacher = both()
    layers = PAIRS if "hidden" in needs else ()
    how = {"dtype": jnp.float32, "divergence": divergence, "layers": layers} | more
    return distil.make_score(student.config, teacher.config, needs, **how)


def scored(run, params, teacher, batch):
    """As the step does it."""
    return run("policy", params, {**batch, "teacher": run("teacher", teacher, batch)})


def outputs(config, params, batch, prefix=""):
    """All log-probabilities (at a temperature) and layers of a model, the plain way."""
    arrays = [batch.get(f"{prefix}{name}") for name in ("tokens", "positions", "segments")]
    hidden, _, captured = decoder.forward(config, params, *arrays, capture=("layers",))
    return heads.logits(config, heads.head_of(config, params), hidden), captured["layers"]


def plain(params, teacher_params, batch, hidden_loss="mse"):
    """The definitions, over all logits at once; float32[B, T] each, at the token that is predicted."""
    student, teacher = both()
    (y, own), (z, other) = outputs(student.config, params, batch), outputs(teacher.config, teacher_params, batch)
    s, t = (jax.nn.log_softmax(a / HOW.temperature) for a in (y, z))
    m = jnp.log(HOW.beta * jnp.exp(t) + (1 - HOW.beta) * jnp.exp(s))
    kl = lambda p, q: jnp.sum(jnp.exp(p) * (p - q), -1)  # noqa: E731
    next_token = jnp.roll(batch["tokens"], -1, 1)[..., None]
    hidden = 0.0
    for i, j in ((0, 1), (1, 2)):
        a, b = own[i] @ params["distil"][f"{i}-{j}"].value, other[j]
        if hidden_loss == "mse":
            hidden += 0.5 * jnp.mean((a - b) ** 2, -1)
        else:
            norm = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
            hidden += 0.5 * (1 - jnp.sum(a * b, -1) / norm)
    out = {
        "divergence": HOW.beta * kl(t, m) + (1 - HOW.beta) * kl(s, m),
        "logp": jnp.take_along_axis(jax.nn.log_softmax(y), next_token, -1)[..., 0],
        "hidden": hidden,
    }
    first = (batch["positions"] == 0) | (batch["segments"] == 0)
    return {name: jnp.where(first, 0.0, jnp.roll(x, 1, 1)) for name, x in out.items()}


def total(out, batch):
    """A sum that all parts reach."""
    weights = dict(zip(ALL, (1.0, -0.3, 0.5), strict=True))
    return sum(jnp.sum(jnp.where(batch["loss_mask"], out[name], 0.0)) * weights[name] for name in ALL)


EXECUTIONS = {
    "scan": Execution(remat="full"),
    "unrolled": Execution(unroll=True),
}


@pytest.mark.parametrize("how", EXECUTIONS)
def test_values_and_gradients(how):
    """Of adapters and projections, and of nothing else, in packed rows; as over all logits."""
    (student, teacher), batch = both(), rows()
    trainable, frozen = tree.partition(student.params, tree.trainable_mask(student.params))
    hidden_loss = {"scan": "mse", "unrolled": "cosine"}[how]
    run = scorer(execution=EXECUTIONS[how], hidden_loss=hidden_loss)

    def loss(trainable, fn):
        out = fn(tree.combine(trainable, frozen))
        return total(out, batch), out

    ways = (
        lambda params: scored(run, params, teacher.params, batch),
        lambda params: plain(params, teacher.params, batch, hidden_loss),
    )
    (got, out), (expected, want) = (jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)(trainable, f) for f in ways)
    for name in ALL:
        np.testing.assert_allclose(out[name], want[name], rtol=1e-5, atol=2e-5, err_msg=name)
    grads = tree.paths(got)
    assert {path.split("/")[0] for path, _ in grads} == {"layers", "distil"} and len(grads) == len(tree.paths(expected))
    for (path, a), (_, b) in zip(grads, tree.paths(expected), strict=True):
        assert float(jnp.abs(b).max()) > 1e-3, path
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-5, err_msg=path)


def test_no_logits_of_all_tokens():
    """In the gradient of a student's loss beside its teacher: 128 tokens are more than the 40 rows of an embedding."""
    (student, teacher), batch, run = both(), rows(((30, 34), (64,)), 64), scorer(execution=EXECUTIONS["scan"])
    trainable, frozen = tree.partition(student.params, tree.trainable_mask(student.params))

    def words(fn):
        jaxpr = jax.make_jaxpr(jax.grad(lambda t: total(fn(tree.combine(t, frozen)), batch)))(trainable)
        shapes = [v.aval.shape for eqn in jaxprs.equations(jaxpr) for v in eqn.outvars if hasattr(v.aval, "shape")]
        return max(int(np.prod(shape)) // V for shape in shapes if V in shape)

    assert words(lambda params: scored(run, params, teacher.params, batch)) <= 40
    assert words(lambda params: plain(params, teacher.params, batch)) == 128


def test_documents_do_not_see_each_other():
    """Each document of a packed row as if alone in it."""
    (student, teacher), run = both(), scorer()
    packed = rows()
    jitted = jax.jit(lambda batch: scored(run, student.params, teacher.params, batch))
    out = jitted(packed)
    for row, start, length in ((0, 0, 5), (0, 5, 7), (1, 1, 9)):
        alone = rows(((length,), (1,)))
        alone["tokens"][0, :length] = packed["tokens"][row, start : start + length]
        own = jitted(alone)
        for name in ALL:
            np.testing.assert_allclose(own[name][0, :length], out[name][row, start : start + length], atol=2e-5)


def test_stored_tokens_are_the_teacher():
    """With all of the vocabulary but one kept, whose probability is the rest, a stored teacher is the live one."""
    (student, teacher), batch = both(), rows()
    top = topk.make_top(teacher.config, V - 1, dtype=jnp.float32, temperature=HOW.temperature)
    stored = jax.jit(top)(teacher.params, batch)
    kept = {"teacher_ids": stored["ids"], "teacher_logp": stored["logp"]}
    needs = ("divergence", "logp")
    live = scored(scorer(needs), student.params, teacher.params, batch)
    run = distil.make_score(student.config, None, needs, dtype=jnp.float32, divergence=HOW, reports=("agreement",))
    out = run("policy", student.params, batch | kept)
    for name in needs:
        np.testing.assert_allclose(out[name], live[name], rtol=0, atol=2e-5)
    assert float(jnp.abs(live["divergence"]).max()) > 0.1 and set(out) == {*needs, "agreement"}
    with pytest.raises(ValueError, match="'teacher'"):
        run("teacher", teacher.params, batch)


def test_another_tokenizer():
    """Targets are paired in the order of each document; distances of sorted probabilities, by plain loops."""
    student, teacher = both()
    own, other = rows(), rows(((4, 10), (3, 5)), 15, seed=1)
    batch = own | {f"teacher_{name}": value for name, value in other.items()}
    run = scorer(("divergence", "hidden"), Divergence("uld"))
    got = jax.jit(lambda batch: scored(run, student.params, teacher.params, batch))(batch)
    (y, layers), (z, theirs) = (
        outputs(host.config, host.params, batch, prefix) for host, prefix in ((student, ""), (teacher, "teacher_"))
    )
    s, t = (np.sort(jax.nn.softmax(a), -1) for a in (y, z))
    found = 0
    for row in range(2):
        for number in (1, 2):
            mine, its = (
                np.flatnonzero((part["segments"][row] == number) & part["loss_mask"][row]) for part in (own, other)
            )
            for a, b in zip(mine, its, strict=False):
                expected = np.abs(s[row, a - 1] - t[row, b - 1]).sum()
                np.testing.assert_allclose(got["divergence"][row, a], expected, rtol=0, atol=2e-5)
                apart = [
                    (layers[i, row, a - 1] @ student.params["distil"][f"{i}-{j}"].value - theirs[j, row, b - 1]) ** 2
                    for i, j in ((0, 1), (1, 2))
                ]
                np.testing.assert_allclose(got["hidden"][row, a], np.mean(apart), rtol=1e-5, atol=2e-5)
                found += 1
    assert found == 2 + 3 + 0 + 2  # the student has 2, 3, 0 and 4 targets, the teacher 2, 5, 1 and 2
    with pytest.raises(ValueError, match="jsd with teacher_tokens"):
        scored(scorer(("divergence",)), student.params, teacher.params, batch)


def test_a_teacher_does_not_read_the_places_of_a_prompt():
    """What it says of rows that keep two positions before each document is what it says of the rows without."""
    student, teacher = both()
    batch = rows()
    tokens, segments, places = score.make_room(batch["tokens"], batch["segments"], 2)
    wide = {"tokens": tokens + (tokens == 0) * 7, "segments": segments}
    without = scorer()("teacher", teacher.params, batch)["hidden"]
    seen = scorer(reserved=2)("teacher", teacher.params, wide)["hidden"]
    real = batch["segments"] > 0
    seen = np.take_along_axis(np.asarray(seen), places[..., None], 1)
    np.testing.assert_allclose(seen[real], without[real], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="reserved: got 2; the student has a prompt of 0"):
        scored(scorer(reserved=2), student.params, teacher.params, wide)


ASSETS = Path(__file__).resolve().parents[2] / "assets" / "tiny"


def test_in_the_training_step():
    """A student learns from a 4-bit teacher: in two micro-batches as in one, and its divergence falls."""
    teacher = jaxft.load(ASSETS, "float32", quantize="nf4")
    assert any(w.packed for w in jax.tree.leaves(teacher.params, is_leaf=tree.is_weight) if tree.is_weight(w))
    small = {**teacher.raw, "num_hidden_layers": 1, "intermediate_size": 64}
    student = Host(small, 0, 0.02)
    config = Distil(ce_weight=0.1, hidden_layers=((-1, -1),), hidden_weight=0.01)
    asked = OBJECTIVES["distil"].asked(config)
    run = distil.make_score(
        student.config, teacher.config, asked.needs, reports=asked.reports, dtype=jnp.float32,
        divergence=Divergence(config.divergence), layers=config.hidden_layers,
    )  # fmt: skip
    params = distil.project(student.params, student.config, teacher.config, config.hidden_layers, jax.random.key(0))
    trainable, frozen = tree.partition(params, tree.trainable_mask(params, "^layers/"))
    batch = rows()
    ends = []
    for parts in (1, 2):
        optimizer = optim.make(OptimConfig(lr=3e-3, schedule="constant", warmup_steps=0), trainable, 4)
        now = state.create(trainable, optimizer, jax.random.key(1))
        train = step.make_step(OBJECTIVES["distil"], config, run, optimizer)
        micro = {name: a.reshape(parts, -1, *a.shape[1:]) for name, a in batch.items()}
        told = []
        for _ in range(4):
            now, metrics = train(now, Models(frozen, {"teacher": teacher.params}), micro)
            told.append({name: float(value) for name, value in metrics.items()})
        ends.append((told, now.trainable))
    assert told[-1]["divergence"] < 0.8 * told[0]["divergence"] and told[-1]["hidden"] < told[0]["hidden"]
    expected = {"loss/distil", "loss/ce", "loss/hidden", "nll", "teacher_agreement", "teacher_entropy", "entropy"}
    assert expected < set(told[0])
    for first, second in zip(ends[0][0], ends[1][0], strict=True):
        assert second == pytest.approx(first, rel=1e-4, abs=1e-6)


def test_the_students_own_arrays_are_a_teacher_with_its_prompt():
    """On packed rows that keep two positions for a learnt prompt: no distance from itself, and some from others."""
    student = Host(STUDENT, 0)
    first = peft.adapt(student, jax.random.key(2), peft.PromptTuning(tokens=2))
    moved = jax.tree.map(lambda t, a: a + 0.5 if t else a, tree.trainable_mask(first), first)
    how = {"dtype": jnp.float32, "divergence": HOW, "reserved": 2}
    run = distil.make_score(student.config, student.config, ("divergence",), **how)
    batch = rows()

    def apart(teacher):
        return run("policy", first, {**batch, "teacher": run("start", teacher, batch)})["divergence"]

    assert float(jnp.max(jnp.abs(apart(first)))) < 1e-5 and float(jnp.max(apart(moved))) > 1e-3
    with pytest.raises(ValueError, match="it has a learnt prompt"):
        run("teacher", first, batch)


def test_projections_come_and_go():
    """The identity between equal widths; trained, counted, and not part of what is exported."""
    student, teacher = Host(STUDENT, 0), Host({**TEACHER, "hidden_size": 32}, 1)
    params = distil.project(student.params, student.config, teacher.config, ((1, -1),), jax.random.key(0))
    np.testing.assert_array_equal(params["distil"]["1-3"].value, np.eye(32))
    assert jax.tree.leaves(tree.trainable_mask(params)).count(True) == 1
    assert tree.count(params) == tree.count(student.params) + 32 * 32
    assert distil.without(params) == student.params
    for layers, told in (
        (((2, 0),), "2 for the student"),
        (((0, -5),), "-5 for the teacher"),
        (((1, 0), (-1, 0)), "once"),
    ):
        with pytest.raises(ValueError, match=told):
            distil.project(student.params, student.config, teacher.config, layers, jax.random.key(0))
    with pytest.raises(ValueError, match="hidden_layers"):
        distil.make_score(student.config, teacher.config, ("hidden",), dtype=jnp.float32, divergence=HOW)


class Words:
    """A tokenizer, as far as its vocabulary."""

    def __init__(self, *words):
        self.words = words

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}


def test_vocabularies_are_the_same_or_refused_by_name():
    """Five rows for three tokens and four rows for three; a token that only one knows; one in another place."""
    configs = [Host({**STUDENT, "vocab_size": n}, 0).config for n in (5, 4)]
    shared = lambda a, b: distil.shared_vocabulary(configs[0], a, configs[1], b)  # noqa: E731
    assert shared(Words("a", "b", "c"), Words("a", "b", "c")) == 4
    assert shared(Words("a", "b", "c", "d", "e"), Words("a", "b", "c", "d")) == 4
    with pytest.raises(ValueError, match="id 2 is 'c' for the teacher and None for the model"):
        shared(Words("a", "b"), Words("a", "b", "c"))
    with pytest.raises(ValueError, match="2 of 4 ids: id 1 is 'c' for the teacher and 'b' for the model"):
        shared(Words("a", "b", "c"), Words("a", "c", "b"))
