"""What a user holds: a model with its parameters, tokenizer and names, loaded from and saved to Hugging Face formats.

Usage:
    model = jaxft.load("path-or-hub-id", dtype="bfloat16")
    logp = model.logprobs(model.params, tokens)
    text = model.generate(model.params, ["Once upon a time"], max_new_tokens=64, temperature=0.7)
    jaxft.save_hf(model, jaxft.merge(params), "out")
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.checkpoint import hf, hub, tokenizer, writer
from jaxft.checkpoint.reader import Place
from jaxft.core import many, tree
from jaxft.core.names import Name, Names
from jaxft.models import families, init, slots
from jaxft.models.config import ModelConfig
from jaxft.peft import store
from jaxft.quant import QuantConfig, chosen
from jaxft.rollout import generate, score
from jaxft.rollout.generate import GenerateConfig
from jaxft.sharding import rules


@dataclass(frozen=True, eq=False)
class Model:
    """A causal language model, or one that scores sequences. Functions take its parameters as an argument: adapted ones
    fit as well."""

    config: ModelConfig
    params: tree.Params = field(repr=False)
    names: Names = field(repr=False)
    """What Hugging Face calls each weight."""
    raw: dict[str, Any] = field(repr=False)
    """Its config.json."""
    source: str | None = None
    """The path or hub id it was loaded from."""
    directory: Path | None = field(default=None, repr=False)
    """The local directory behind `source`."""
    own_tokenizer: Any = field(default=None, repr=False)
    """A tokenizer to use in place of the one in `directory`."""
    new_tokens: tuple[int, ...] = ()
    """Ids of the tokens that it has been given (`grow`)."""
    originals: Callable[[Name, tuple[int, ...]], jax.Array] | None = field(default=None, repr=False)
    """(name of a weight, index of a layer) -> its matrix [in, out] on disk, where it was packed as it was read."""

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The `transformers` tokenizer, loaded when first asked for; None if the directory holds none."""
        if self.own_tokenizer is not None or self.directory is None:
            return self.own_tokenizer
        return tokenizer.load(self.directory)

    @functools.cached_property
    def generation(self) -> dict[str, Any]:
        """Its generation_config.json; empty if there is none."""
        file = None if self.directory is None else self.directory / "generation_config.json"
        return json.loads(file.read_text(encoding="utf-8")) if file is not None and file.exists() else {}

    @functools.cached_property
    def ends(self) -> list[int]:
        """Token ids that end a completion."""
        return generate.ends_of(self.raw, self.generation, self.tokenizer)

    def logprobs(
        self, params: tree.Params, tokens_BT: Any, segments_BT: Any = None, *, adapters: Sequence[int] | None = None
    ) -> jax.Array:
        """float32[B, T-1]: log p(token t+1 | tokens up to t), in nats.

        ``tokens`` int32[B, T], rows of one document each, padded on the right with any id (what is returned for padding
        means nothing). ``segments`` int32[B, T] allows any padding (0) and several documents a row (from 1): 0 is
        returned where the next token is padding or starts a document. ``adapters``: of stacked adapters
        (`stack_adapters`), the one that each row uses; -1 is the base. A learnt prompt goes before every document."""
        params = params if adapters is None else many.for_rows(params, adapters)
        tokens_BT = jnp.asarray(tokens_BT, jnp.int32)
        reserved = slots.prompt_length(params)
        if segments_BT is None or not reserved:
            segments_BT = None if segments_BT is None else jnp.asarray(segments_BT, jnp.int32)
            return _logprobs(self.config, params, tokens_BT, segments_BT)[:, 1:]
        *wide, index_BT = score.make_room(np.asarray(tokens_BT), np.asarray(segments_BT), reserved)
        return jnp.take_along_axis(_logprobs(self.config, params, *wide), index_BT, axis=1)[:, 1:]

    def rewards(
        self, params: tree.Params, tokens_BT: Any, segments_BT: Any = None, *, adapters: Sequence[int] | None = None
    ) -> jax.Array:
        """What a reward model says of sequences, at the last token of each.

        Without ``segments``: float32[B], of int32[B, T] rows of one sequence each, which ends at the last token that is
        not the config's padding, as in `transformers`. With ``segments`` int32[B, T], several sequences a row (numbered
        from 1; 0 is padding): float32[B, S], S being the largest number, and 0 where a row has no such sequence.
        ``adapters``: as of `logprobs`. Raises ValueError for a model that is no reward model (`jaxft.reward_model`)."""
        params = params if adapters is None else many.for_rows(params, adapters)
        tokens_BT, index_BT = np.asarray(tokens_BT, np.int32), None
        if segments_BT is None:
            real_BT = tokens_BT != self.raw.get("pad_token_id")
            last_B = np.max(np.where(real_BT, np.arange(tokens_BT.shape[1]), 0), axis=1)
            said_BT = _rewards(self.config, params, tokens_BT, None)
            return jnp.take_along_axis(said_BT, last_B[:, None], axis=1)[:, 0]
        segments_BT = np.asarray(segments_BT, np.int32)
        numbers_S = np.arange(1, int(segments_BT.max(initial=0)) + 1)
        held_BST = segments_BT[:, None] == numbers_S[:, None]
        last_BS = np.max(np.where(held_BST, np.arange(tokens_BT.shape[1]), -1), axis=2, initial=-1)
        if reserved := slots.prompt_length(params):
            tokens_BT, segments_BT, index_BT = score.make_room(tokens_BT, segments_BT, reserved)
        said_BT = _rewards(self.config, params, tokens_BT, segments_BT)
        said_BT = said_BT if index_BT is None else jnp.take_along_axis(said_BT, index_BT, axis=1)
        return jnp.where(last_BS < 0, 0.0, jnp.take_along_axis(said_BT, np.maximum(last_BS, 0), axis=1))

    def generate(
        self,
        params: tree.Params,
        prompts: Sequence[str | list[dict[str, Any]]],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.7,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        samples: int = 1,
        seed: int = 0,
        task: int = 0,
        adapters: Sequence[int] | None = None,
    ) -> list[str]:
        """``samples`` completions of each prompt: a text to be continued, or a chat's messages to be answered.

        ``temperature`` 0 is greedy. ``stop``: texts that end a completion and are no part of it. The same seed gives
        the same texts. ``task`` chooses a multitask prompt's.
        ``adapters``: of stacked adapters (`stack_adapters`), the one that each prompt uses; -1 is the base. Raises
        ValueError without a tokenizer."""
        if isinstance(prompts, str):
            raise TypeError(f"prompts: got one string; expected a list of them, such as [{prompts[:20]!r}]")
        settings = GenerateConfig(
            max_new_tokens, temperature, top_k, top_p, seed, min_p=min_p, repetition_penalty=repetition_penalty,
            stop=tuple(stop),
        )  # fmt: skip
        rows, tasks = [self._encode(p) for p in prompts], [task] * len(prompts) if task else None
        how = {"tasks": tasks, "adapters": adapters, "samples": samples, "tokenizer": self.tokenizer}
        made = generate.generate(self.config, params, rows, settings, self.ends, **how)
        said = (self.tokenizer.decode(completion.tokens, skip_special_tokens=True) for completion in made)
        return [generate.cut(text, settings.stop) for text in said]

    def _encode(self, prompt: str | list[dict[str, Any]]) -> list[int]:
        if self.tokenizer is None:
            raise ValueError(
                f"{self.source}: the directory holds no tokenizer, so text cannot be read or written; add its "
                "tokenizer.json, or call jaxft.rollout.generate.generate with token ids"
            )
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        return self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]


@functools.partial(jax.jit, static_argnums=0)
def _logprobs(config: ModelConfig, params: tree.Params, tokens_BT: jax.Array, segments_BT: jax.Array | None):
    batch = {"tokens": tokens_BT} | ({} if segments_BT is None else {"segments": segments_BT})
    return score.make_score(config, dtype=params["embed"]["tokens"].dtype)("policy", params, batch)["logp"]


@functools.partial(jax.jit, static_argnums=0)
def _rewards(config: ModelConfig, params: tree.Params, tokens_BT: Any, segments_BT: Any) -> jax.Array:
    batch = {"tokens": tokens_BT} | ({} if segments_BT is None else {"segments": segments_BT})
    found = score.make_score(config, (score.REWARD,), dtype=params["embed"]["tokens"].dtype)
    return found("policy", params, batch)[score.REWARD]


def load(
    source: str | os.PathLike[str],
    dtype: str = "bfloat16",
    *,
    revision: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    sharding: Place | None = None,
    quantize: str | QuantConfig | None = None,
) -> Model:
    """Loads a model's directory or hub id.

    ``dtype``: float32, bfloat16, float16, or auto (what the checkpoint says). A ``mesh`` shards the weights by
    `sharding.rules`, unless ``sharding(path, shape)`` says where each goes; by default all are on one device.
    ``quantize``: nf4, fp4, int4, int8_blockwise, int8, fp8 or a `quant.QuantConfig`: linear layers are stored in few
    bits, each packed as it is read. A checkpoint that bitsandbytes (4 bits), GPTQ, AWQ, HQQ or compressed-tensors (4 or
    8) quantised is loaded as it is. Raises CheckpointError with what is wrong and what to do.
    """
    directory = hub.directory(source, revision)
    loaded = hf.load(directory, dtype, mesh=mesh, sharding=sharding, quantize=quantize)
    made = Model(loaded.config, loaded.params, loaded.names, loaded.raw, os.fspath(source), directory)
    return dataclasses.replace(made, originals=loaded.originals)


def random(
    source: str | os.PathLike[str],
    dtype: str = "bfloat16",
    *,
    key: jax.Array,
    revision: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    quantize: str | QuantConfig | None = None,
) -> Model:
    """A model with the architecture and tokenizer of a directory or hub id, and random weights (`models.init`).

    ``quantize``: as of `load`; each layer is packed as it is drawn."""
    directory = hub.directory(source, revision)
    raw = hf.config_of(directory)
    config, names = families.read(raw, str(directory / "config.json"))
    quant = chosen(quantize)
    if quant is None and isinstance(quantize, QuantConfig) and quantize.compute != "exact":
        raise ValueError(f"quant.compute: got {quantize.compute} with quant.method=none; expected nf4 or fp4 with it")
    make = functools.partial(
        init.random,
        config,
        names,
        dtype=jnp.dtype(dtype),
        deviation=raw.get("initializer_range", 0.02),
        pack=None if quant is None else quant.packer,
    )
    shardings = None if mesh is None else rules.shardings(jax.eval_shape(make, key), mesh)
    params = jax.jit(make, out_shardings=shardings)(key)
    return Model(config, params, names, raw, os.fspath(source), directory)


def save_hf(
    model: Model,
    params: tree.Params,
    directory: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    packed: bool = False,
) -> Path:
    """Writes a model that `transformers` loads: weights, config, generation config, tokenizer.

    ``params`` without adapters (`jaxft.merge`). ``dtype``: of every tensor, by default that of the embedding. The
    directory appears complete or not at all; one that holds something is refused unless ``overwrite``. ``packed``:
    nf4 and fp4 weights are written as bitsandbytes stores them, integers in groups as GPTQModel, instead of dense;
    other weights in few bits (int8 and fp8 by output) are refused then."""
    made = hf.Loaded(model.config, model.names, params, model.raw)
    return writer.save(
        made,
        directory,
        model.directory,
        model.own_tokenizer,
        dtype=dtype,
        shard=max_shard_size,
        overwrite=overwrite,
        packed=packed,
    )


def save_adapter(
    model: Model,
    params: tree.Params,
    directory: str | os.PathLike[str],
    methods: Sequence[Any] = (),
    *,
    overwrite: bool = False,
) -> Path:
    """Writes the adapter in ``params`` as a directory that `peft` loads on the model's source.

    What peft's format cannot hold exactly is written in our own, which only `load_adapter` reads. ``methods``: the
    configs that made the adapter, told to its readers."""
    return store.save(
        params,
        model.names,
        model.config.num_layers,
        directory,
        methods=methods,
        base=model.params,
        new_tokens=model.new_tokens,
        base_model_name_or_path=model.source,
        overwrite=overwrite,
    )


def load_adapter(model: Model, source: str | os.PathLike[str], *, revision: str | None = None) -> tree.Params:
    """The model's parameters with an adapter on them, made by `peft` or by us: a directory or a hub id.

    The base's buffers are shared. An adapter of a reward model wants one: ``jaxft.reward_model(model, init="zeros")``,
    whose head it brings. Raises AdapterError or CheckpointError naming what does not fit."""
    return store.load(model.params, model.names, model.config.num_layers, hub.directory(source, revision))
