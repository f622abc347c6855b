"""Pairs whose prompts stand once: the same sums and the same gradients as with each sequence whole."""

import dataclasses
import json
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import config as config_
from jaxft import data, peft
from jaxft.checkpoint import tokenizer as tokenizer_
from jaxft.core import tree
from jaxft.data import pack, sequences
from jaxft.model import Model
from jaxft.models import families, init
from jaxft.models.decoder import Execution
from jaxft.objectives import terms
from jaxft.rollout import distil, score

ASSETS = Path(__file__).resolve().parents[2] / "assets"
VOCAB = 2048
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
FAMILIES = {
    "qwen2": {"model_type": "qwen2", **SMALL},
    "gemma2": {"model_type": "gemma2", **SMALL, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8,
               "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gpt2": {"model_type": "gpt2", "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}  # fmt: skip
METHODS = {
    "lora": peft.LoRA(rank=2),
    "prompt": peft.PromptTuning(tokens=3),
    "prefix": peft.PrefixTuning(tokens=2),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    rng, words = random.Random(0), "red blue seven house and or not tree hill".split()

    def say(low, high):
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"prompt": say(1, 14) + " ", "chosen": "yes " + say(1, 6), "rejected": "no " + say(1, 6)} for _ in range(13)
    ]
    rows[3]["prompt"] = rows[9]["prompt"] = ""  # nothing but what stands before every text
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = data.DataConfig(path=str(file), max_length=40, shuffle=False)
    return config, data.prepare(config, tokenizer_.load(ASSETS / "tiny"), rows="pairs").train


def batch_of(prepared, share, packing, reserved=0, rows=13):
    config, examples = prepared
    config = dataclasses.replace(config, packing=packing)
    made = data.Loader(examples, config, batch_rows=rows, epochs=1, reserved=reserved, share=share)
    return made, made.batch(0)


def model_of(name, method):
    config, names = families.read(FAMILIES[name])
    model = Model(config, init.random(config, names, jax.random.key(0), jnp.float32, 0.3), names, FAMILIES[name])
    params = peft.adapt(model, jax.random.key(1), METHODS[method])
    mask = tree.trainable_mask(params)
    draws = iter(jax.random.split(jax.random.key(2), 100))
    moved = jax.tree.map(lambda t, a: a + 0.1 * jax.random.normal(next(draws), a.shape) if t else a, mask, params)
    return config, *tree.partition(moved, mask)


def sums(config, params, batch, **how):
    run = score.make_score(config, dtype=jnp.float32, execution=Execution(**how))
    logp = run("policy", params, batch)["logp"]
    return terms.by_sequence(logp, batch["loss_mask"], batch["segments"], batch["sequence_mask"].shape[1])


@pytest.mark.parametrize(
    ("family", "method", "how"),
    [("qwen2", "lora", {"remat": "full"}), ("gemma2", "lora", {"unroll": True, "remat": "save"}), ("gpt2", "lora", {}),
     ("qwen2", "prompt", {}), ("gemma2", "prefix", {})],
)  # fmt: skip
def test_sums_and_gradients_are_those_of_whole_sequences(prepared, family, method, how):
    """Each pair in a row of its own; pairs weigh differently, so that one taken for another shows."""
    config, trainable, frozen = model_of(family, method)
    reserved = 3 if method == "prompt" else 0
    found = []
    for share in (False, True):
        _, batch = batch_of(prepared, share, "none", reserved)
        weights = jnp.where(batch["sequence_mask"], jnp.cos(jnp.arange(26.0)).reshape(13, 2), 0)

        @jax.jit
        def run(trainable, batch, weights=weights):
            def loss(trainable):
                made = sums(config, tree.combine(trainable, frozen), batch, **how)
                return jnp.sum(made * weights), made

            return jax.grad(loss, has_aux=True)(trainable)

        found.append(run(trainable, batch))
        assert ("unfold" in batch) == share
    (whole, at_once), (shared, in_part) = found
    np.testing.assert_allclose(in_part, at_once, rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), shared, whole)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(whole)) > 0.1


def test_packed_rows_hold_the_same_sequences_in_fewer_tokens(prepared):
    config, trainable, frozen = model_of("qwen2", "lora")
    found = {}
    for share in (False, True):
        loader, batch = batch_of(prepared, share, "best_fit", rows=8)
        made = sums(config, tree.combine(trainable, frozen), batch)
        found[share] = np.sort(np.asarray(made)[batch["sequence_mask"]]), int((batch["segments"] > 0).sum())
        assert batch["sequence_mask"].sum() == 26 and batch["tokens"].shape[1] == loader.length == 80
    np.testing.assert_allclose(found[True][0], found[False][0], rtol=1e-4, atol=1e-4)
    _, examples = prepared
    starts = examples.offsets[1:-1:2]
    prompts = sequences.completions(examples, starts) - starts
    assert found[False][1] - found[True][1] == (prompts - 1).sum() > 50


def test_every_epoch_fits_the_width(prepared):
    config, examples = prepared
    config = dataclasses.replace(config, shuffle=True)
    made = data.Loader(examples, config, batch_rows=2, share=True, reserved=2)
    given = made.plan.pieces.given
    assert given is not None and (given[1::2] == 0).sum() == 2  # the empty prompts
    fullest = 0
    for number in range(5 * made.batches_per_epoch):
        batch = made.batch(number)
        assert batch["unfold"].shape[1] == made.width and batch["tokens"].shape[1] == made.length
        assert (np.bincount(batch["positions"][batch["segments"] > 0]) > 0).all()
        for row in range(2):
            used = batch["unfold_segments"][row] > 0
            fullest = max(fullest, int(used.sum()))
            real = batch["segments"][row] > 0
            assert (batch["unfold"][row][batch["fold"][row][real]] == np.flatnonzero(real)).all()
            twice = batch["fold_again"][row] >= 0
            assert (batch["unfold"][row][batch["fold_again"][row][twice]] == np.flatnonzero(twice)).all()
            assert used.sum() == real.sum() + twice.sum()
    assert fullest == made.width


def test_another_reference_reads_no_tokens_where_a_prompt_is_learnt(prepared):
    """Its own scores of the rows with places kept for a prompt are those without."""
    config, trainable, frozen = model_of("qwen2", "lora")
    params = tree.combine(trainable, frozen)
    _, kept = batch_of(prepared, True, "none", reserved=3)
    _, plain = batch_of(prepared, True, "none")
    bare = distil.unreserved(kept, 3) | {name: kept[name] for name in ("loss_mask", "sequence_mask")}
    bare["segments"] = jnp.where(kept["segments"] > 0, bare["segments"], 0)
    np.testing.assert_allclose(sums(config, params, bare), sums(config, params, plain), rtol=1e-4, atol=1e-4)


def test_a_prompt_of_one_token_is_not_shared():
    found = pack.Pieces(np.array([0, 5]), np.array([5, 9]), group=2)
    shared = pack.share(found, np.array([1, 6]))
    assert shared.given is not None and shared.given.tolist() == [0, 0] and shared.start.tolist() == [0, 5]


def test_sources_of_a_mixture_share_each_their_prompts(prepared, tmp_path):
    config, examples = prepared
    lines = Path(str(config.path)).read_text().splitlines(keepends=True)
    found = {}
    for name, part in (("a", lines[:5]), ("b", lines[5:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    told = {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in "ab"}
    yaml = {"model": {"path": "x"}, "data": {"sources": told, "max_length": 40}, "objective": {"name": "dpo"}}
    (tmp_path / "config.yaml").write_text(json.dumps(yaml))
    mixed = config_.load(tmp_path / "config.yaml").data
    both = data.prepare(mixed, tokenizer_.load(ASSETS / "tiny"), rows="pairs").train
    for share in (False, True):
        made = data.Loader(both, mixed, batch_rows=4, share=share)
        batches = [made.batch(number) for number in range(6)]
        found[share] = sum(int((batch["segments"] > 0).sum()) for batch in batches)
        for batch in batches if share else []:
            twice = batch["fold_again"] >= 0
            assert twice.any() and (batch["unfold_segments"] > 0).sum() == (batch["segments"] > 0).sum() + twice.sum()
    assert len(both) == len(examples) and found[True] < found[False]
