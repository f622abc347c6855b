"""Divergences of a student from a teacher: equal to torch over all logits at once, which here never exist."""

import dataclasses
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxft.models import divergences, heads
from jaxft.models.config import Layer, ModelConfig
from jaxft.models.divergences import Divergence
from jaxft.peft.lora import LoRAWeight
from jaxft.quant import nf4
from jaxft.testing import jaxprs

B, T, D, E, V, K = 2, 11, 16, 64, 37, 5
STUDENT = ModelConfig("llama", V, D, 32, 2, 2, 8, (Layer(),), final_softcap=3.0)
TEACHER = ModelConfig("llama", V, E, 32, 2, 2, 8, (Layer(),), tie_embeddings=True, logits_scale=0.2)
WEIGHTS = np.random.default_rng(9).normal(size=(2, B, T)).astype(np.float32)


def arrays(student=STUDENT, teacher=TEACHER, rows=B):
    """(head, x, labels) of the student, (head, x) of the teacher."""

    def one(config, key):
        shape = (config.vocab_size, config.hidden_size)
        head = jax.random.normal(key, shape if config.tie_embeddings else shape[::-1]) * 0.4
        return head, jax.random.normal(jax.random.fold_in(key, 1), (rows, T, config.hidden_size))

    labels = jax.random.randint(jax.random.key(2), (rows, T), 0, student.vocab_size)
    return *one(student, jax.random.key(0)), labels, *one(teacher, jax.random.key(1))


def logits(config, head, x):
    """All of them, in torch."""
    y = x @ (head.T if config.tie_embeddings else head) * config.logits_scale
    return y if config.final_softcap is None else config.final_softcap * torch.tanh(y / config.final_softcap)


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


def expected(how: Divergence, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """The definitions, of probabilities."""
    if how.name == "uld":
        t, s = (a.sort(-1, descending=True).values for a in (t, s))
        width = max(t.shape[-1], s.shape[-1])
        t, s = (torch.nn.functional.pad(a, (0, width - a.shape[-1])) for a in (t, s))
        return (t - s).abs().sum(-1)
    beta = 0.5 if how.name == "js" else how.beta
    m = beta * t + (1 - beta) * s
    return {
        "forward_kl": lambda: kl(t, s),
        "reverse_kl": lambda: kl(s, t),
        "js": lambda: beta * kl(t, m) + (1 - beta) * kl(s, m),
        "jsd": lambda: beta * kl(t, m) + (1 - beta) * kl(s, m),
        "tvd": lambda: (t - s).abs().sum(-1) / 2,
        "skew_forward_kl": lambda: kl(t, how.skew * t + (1 - how.skew) * s),
        "skew_reverse_kl": lambda: kl(s, how.skew * s + (1 - how.skew) * t),
    }[how.name]()


HOW = [
    Divergence("forward_kl"),
    Divergence("reverse_kl", temperature=0.7),
    Divergence("js"),
    Divergence("jsd", beta=0.2, temperature=1.7),
    Divergence("tvd"),
    Divergence("skew_forward_kl", skew=0.3),
    Divergence("skew_reverse_kl"),
    Divergence("uld", temperature=1.3),
]
named = pytest.mark.parametrize("how", HOW, ids=lambda how: how.name)
trained = pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])


def as_torch(*arrays):
    return [torch.tensor(np.asarray(a), dtype=torch.float64 if a.dtype.kind == "f" else torch.int64) for a in arrays]


def against_torch(how, student, teacher, score, reference, *, trained, values=arrays):
    """Values and gradients of a weighted sum of log-probability and divergence."""
    head, x, labels, *held = values(student, teacher)

    def loss(head, x):
        out = score(head, x, labels, *held)
        return sum(jnp.sum(out[n] * w) for n, w in zip(("logp", "divergence"), WEIGHTS, strict=True)), out

    which = (0, 1) if trained else (1,)
    got, out = jax.jit(jax.grad(loss, which, has_aux=True))(head, x)
    head, x, labels, *held = as_torch(head, x, labels, *held)
    head.requires_grad_(), x.requires_grad_()
    y = logits(student, head, x)
    want = {
        "logp": y.log_softmax(-1).gather(-1, labels[..., None])[..., 0],
        "divergence": reference(y / how.temperature, *held),
    }
    sum((want[n] * torch.tensor(w)).sum() for n, w in zip(want, WEIGHTS, strict=True)).backward()
    for name in want:
        assert out[name].shape == (B, T) and out[name].dtype == jnp.float32
        np.testing.assert_allclose(out[name], want[name].detach(), rtol=0, atol=1e-5, err_msg=name)
    for a, b in zip(got, [[head, x][i].grad for i in which], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
    assert float(want["divergence"].detach().abs().min()) > 1e-3


def live(how, student=STUDENT, teacher=TEACHER, **more):
    def score(head, x, labels, teacher_head, teacher_x):
        held = (teacher, teacher_head, teacher_x)
        return divergences.token_scores(how, student, head, x, labels, held, divergences.GRADIENTS, **more)

    return score


@named
def test_values_and_gradients(how):
    def reference(y, head, x):
        return expected(how, (logits(TEACHER, head, x) / how.temperature).softmax(-1), y.softmax(-1))

    trained = how.name in ("jsd", "uld")
    against_torch(how, STUDENT, TEACHER, live(how), reference, trained=False)
    if trained:
        against_torch(how, STUDENT, TEACHER, live(how), reference, trained=True)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_jsd_is_trls(beta):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        from trl.experimental.gkd import GKDTrainer
    how = Divergence("jsd", beta=beta, temperature=0.9)
    head, x, labels, *held = arrays()
    got = live(how)(head, x, labels, *held)["divergence"]
    head, x, *held = as_torch(head, x, *held)
    both = logits(STUDENT, head, x), logits(TEACHER, *held)
    want = GKDTrainer.generalized_jsd_loss(*both, beta=beta, temperature=0.9, reduction="none")
    np.testing.assert_allclose(got, want.sum(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", [(37, 40, 33), (40, 37, 37)], ids=str)
def test_rows_that_only_pad_a_vocabulary_are_left_out(sizes):
    """Of the student's and the teacher's rows only those that both tokenizers have are compared."""
    own, other, shared = sizes
    how = Divergence("forward_kl")
    student, teacher = (dataclasses.replace(c, vocab_size=n) for c, n in ((STUDENT, own), (TEACHER, other)))

    def reference(y, head, x):
        return expected(how, logits(teacher, head, x)[..., :shared].softmax(-1), y[..., :shared].softmax(-1))

    against_torch(how, student, teacher, live(how, student, teacher, vocabulary=shared), reference, trained=False)
    with pytest.raises(ValueError, match=f"{own} tokens, the teacher {other}"):
        live(how, student, teacher)(*arrays(student, teacher))
    with pytest.raises(ValueError, match="38"):
        live(how, student, teacher, vocabulary=38)(*arrays(student, teacher))


@pytest.mark.parametrize("other", [31, 41])
def test_different_tokenizers(other):
    """Sorted probabilities of 37 and 31 or 41 tokens; the smaller vocabulary's missing ones have probability 0."""
    how, teacher = Divergence("uld"), dataclasses.replace(TEACHER, vocab_size=other)

    def reference(y, head, x):
        return expected(how, logits(teacher, head, x).softmax(-1), y.softmax(-1))

    against_torch(how, STUDENT, teacher, live(how, STUDENT, teacher), reference, trained=False)


def likeliest(temperature):
    """The student's arrays with the K likeliest tokens of the teacher in place of its head and states."""

    def values(student, teacher):
        head, x, labels, *held = arrays(student, teacher)
        logp = (logits(teacher, *as_torch(*held)) / temperature).log_softmax(-1)
        best = logp.topk(K)
        return head, x, labels, jnp.asarray(best.indices.numpy(), jnp.int32), jnp.asarray(best.values, jnp.float32)

    return values


@pytest.mark.parametrize("rest", ["bucket", "none"])
@pytest.mark.parametrize("how", [HOW[0], HOW[1], HOW[3]], ids=lambda how: how.name)
def test_stored(how, rest):
    """K of the vocabulary and one bucket of all others; or those K alone, both models' probabilities scaled to 1."""
    how = dataclasses.replace(how, rest=rest)

    def score(head, x, labels, *held):
        needs = divergences.GRADIENTS
        return divergences.token_scores_stored(how, STUDENT, head, x, labels, held, needs)

    def reference(y, ids, logp):
        t, s = logp.exp(), y.softmax(-1).gather(-1, ids)
        if rest == "none":
            return expected(how, t / t.sum(-1, keepdim=True), s / s.sum(-1, keepdim=True))
        return expected(how, *(torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1) for p in (t, s)))

    values = likeliest(how.temperature)
    against_torch(how, STUDENT, TEACHER, score, reference, trained=how.name == "jsd", values=values)


def test_stored_ids_of_a_vocabulary_that_the_student_pads():
    """The student's rows for no token count neither as the rest nor as its choice; too many ids are refused."""
    head, x, labels, *held = likeliest(1.0)(STUDENT, TEACHER)
    padded = dataclasses.replace(STUDENT, vocab_size=V + 3)
    wide = jnp.concatenate([head, 5.0 * jnp.ones((D, 3))], axis=1)
    ask = {"needs": ("divergence",), "reports": ("agreement",)}
    want = divergences.token_scores_stored(HOW[0], STUDENT, head, x, labels, tuple(held), **ask)
    got = divergences.token_scores_stored(HOW[0], padded, wide, x, labels, tuple(held), **ask, vocabulary=V)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="the student has"):
        divergences.token_scores_stored(HOW[0], STUDENT, head, x, labels, tuple(held), vocabulary=V + 1)


def test_stored_of_a_sure_teacher_and_a_sure_student():
    """Probability 1 for one token, in float16; and what stands at padding: finite, and so are the gradients."""
    sure = dataclasses.replace(STUDENT, final_softcap=None, logits_scale=200.0)
    head, x, labels, *_ = arrays()
    ids = jnp.broadcast_to(jnp.arange(K, dtype=jnp.int32), (B, T, K)).at[0].set(0)
    logp = jnp.full((B, T, K), -jnp.inf, jnp.float16).at[..., 0].set(0).at[0].set(0)
    for name in ("forward_kl", "reverse_kl", "jsd"):

        def loss(x, name=name):
            how = Divergence(name)
            out = divergences.token_scores_stored(how, sure, head, x, labels, (ids, logp))["divergence"]
            return jnp.sum(out), out

        grad, out = jax.jit(jax.grad(loss, has_aux=True))(x)
        assert bool(jnp.isfinite(grad).all() & jnp.isfinite(out).all())


def test_reports():
    """Of the student at temperature 1: entropy and whether it is right; of the teacher its entropy; do they agree."""
    head, x, labels, *held = arrays()
    reports = ("entropy", "correct", "agreement", "teacher_entropy", "logp")
    how = Divergence("js", temperature=2.0)
    out = divergences.token_scores(how, STUDENT, head, x, labels, (TEACHER, *held), reports=reports)
    assert set(out) == {"divergence", *reports}
    own = heads.token_scores(STUDENT, head, x, labels, ("logp", "entropy", "correct"))
    for name in own:
        np.testing.assert_allclose(out[name], own[name], rtol=0, atol=1e-6)
    head, x, *held = as_torch(head, x, *held)
    y, t = logits(STUDENT, head, x), logits(TEACHER, *held)
    np.testing.assert_array_equal(out["agreement"], y.argmax(-1) == t.argmax(-1))
    entropy = torch.distributions.Categorical(logits=t / 2).entropy()
    np.testing.assert_allclose(out["teacher_entropy"], entropy, rtol=0, atol=1e-5)
    head, x, labels, *stored = likeliest(1.0)(STUDENT, TEACHER)
    out = divergences.token_scores_stored(HOW[0], STUDENT, head, x, labels, tuple(stored), reports=("agreement",))
    np.testing.assert_array_equal(out["agreement"], y.argmax(-1) == t.argmax(-1))


def test_only_what_is_asked_has_a_gradient():
    """A log-probability that is only reported, and the whole teacher, get none."""
    head, x, labels, *held = arrays()

    def loss(x, held, part):
        out = divergences.token_scores(HOW[0], STUDENT, head, x, labels, (TEACHER, *held), reports=("logp",))
        return jnp.sum(out[part])

    of_x, of_teacher = jax.grad(loss, (0, 1))(x, held, "divergence")
    assert float(jnp.abs(of_x).max()) > 0.01
    nothing = (jax.grad(loss)(x, held, "logp"), of_teacher)
    assert not any(bool(jnp.any(a != 0)) for a in jax.tree.leaves(nothing))


def test_a_packed_teacher_and_an_adapted_student():
    """A 4-bit head as the dense matrix it stands for; of an adapter on the student's head, gradients of its factors."""
    teacher = dataclasses.replace(TEACHER, tie_embeddings=False)
    head, x, labels, teacher_head, teacher_x = arrays(STUDENT, teacher)
    packed = nf4.quantize(teacher_head, 64, double_quant=True)
    a, b = jax.random.normal(jax.random.key(3), (D, 2)), jax.random.normal(jax.random.key(4), (2, V))

    def loss(factors, teacher_head, dense):
        weight = LoRAWeight(head, *factors, jnp.float32(0.5), jnp.int32(2))
        weight = weight.dense() if dense else weight
        return jnp.sum(live(HOW[3], STUDENT, teacher)(weight, x, labels, teacher_head, teacher_x)["divergence"])

    run = jax.jit(jax.value_and_grad(loss), static_argnums=2)
    got, want = run((a, b), packed, False), run((a, b), packed.dense(), True)
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-5, atol=2e-5), got, want)


def test_under_a_mesh():
    """As on one device, of a student whose head trains and a teacher whose head is tied."""
    student, teacher = (dataclasses.replace(c, vocab_size=40) for c in (STUDENT, TEACHER))
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:8]).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    values = arrays(student, teacher, rows=4)
    place = lambda a, *axes: jax.device_put(a, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))  # noqa: E731
    axes = [("fsdp", "tensor"), (("data", "fsdp"),), (("data", "fsdp"),), ("tensor", "fsdp"), (("data", "fsdp"),)]
    laid = [place(a, *where) for a, where in zip(values, axes, strict=True)]

    def loss(on, head, x, *rest):
        out = live(HOW[3], student, teacher, mesh=on)(head, x, *rest)
        return jnp.sum(out["divergence"] - out["logp"])

    run = lambda on, args: jax.jit(jax.value_and_grad(lambda *a: loss(on, *a), (0, 1)))(*args)  # noqa: E731
    for got, want in zip(jax.tree.leaves(run(mesh, laid)), jax.tree.leaves(run(None, values)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)  # of order ten


def words(jaxpr) -> int:
    """The largest number of tokens for which an array holds something for each word of a vocabulary."""
    shapes = [v.aval.shape for eqn in jaxprs.equations(jaxpr) for v in eqn.outvars if hasattr(v.aval, "shape")]
    return max(int(np.prod(shape)) // n for shape in shapes for n in (1009, 1013) if n in shape)


@trained
def test_all_logits_never_exist(trained):
    """Neither model's, forward or backward: there are 160 tokens, and arrays over a vocabulary for 20 at a time."""
    tiny = {"hidden_size": 4}  # so that the heads and their gradients are small beside a chunk
    student, teacher = (dataclasses.replace(c, vocab_size=n, **tiny) for c, n in ((STUDENT, 1009), (TEACHER, 1013)))
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    labels, states = shape(2, 80, dtype=jnp.int32), shape(2, 80, 4)
    rows = (labels, shape(1013, 4), states)
    top = (labels, shape(2, 80, K, dtype=jnp.int32), shape(2, 80, K))

    def stored(head, x, labels, *held):
        return divergences.token_scores_stored(HOW[0], student, head, x, labels, held, divergences.GRADIENTS)

    scores = [(live(how, student, teacher, vocabulary=1009), rows) for how in (HOW[0], HOW[3])]
    scores += [(stored, top), (live(HOW[7], student, teacher), rows)]
    for score, more in scores:

        def loss(head, x, *more, score=score):
            out = score(head, x, *more)
            return jnp.sum(out["divergence"] - out["logp"])

        jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1) if trained else (1,)))(shape(4, 1009), states, *more)
        assert words(jaxpr) == 20
    whole = jax.make_jaxpr(lambda head, x: jax.nn.log_softmax(x @ head))(shape(4, 1009), states)
    assert words(whole) == 160  # what would be found


def test_top():
    """Sorted by size, with log-probabilities of the softmax over the vocabulary at the temperature."""
    head, x, *_ = arrays()
    got = jax.jit(lambda head, x: divergences.top(STUDENT, head, x, K, temperature=1.5, vocabulary=30))(head, x)
    want = (logits(STUDENT, *as_torch(head, x))[..., :30] / 1.5).log_softmax(-1).topk(K)
    np.testing.assert_array_equal(got["ids"], want.indices)
    np.testing.assert_allclose(got["logp"], want.values, rtol=0, atol=1e-5)
    assert got["ids"].dtype == jnp.int32 and got["ids"].shape == (B, T, K)


REFUSED = {
    "entropy": lambda head, x, labels, held: divergences.token_scores(
        HOW[0], STUDENT, head, x, labels, (TEACHER, *held), ("entropy",)
    ),
    "perplexity": lambda head, x, labels, held: divergences.token_scores(
        HOW[0], STUDENT, head, x, labels, (TEACHER, *held), reports=("perplexity",)
    ),
    "agreement": lambda head, x, labels, held: divergences.token_scores(
        HOW[7], STUDENT, head, x, labels, (TEACHER, *held), reports=("agreement",)
    ),
    "stored teacher": lambda head, x, labels, held: divergences.token_scores_stored(
        HOW[7], STUDENT, head, x, labels, (labels[..., None], x[..., :1])
    ),
    "leave no rest": lambda head, x, labels, held: divergences.token_scores_stored(
        HOW[0], STUDENT, head, x, labels, (jnp.zeros((B, T, V), jnp.int32), jnp.zeros((B, T, V)))
    ),
    "top_k": lambda head, x, labels, held: divergences.top(STUDENT, head, x, V),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    head, x, labels, *held = arrays()
    with pytest.raises(ValueError, match=what):
        REFUSED[what](head, x, labels, held)
