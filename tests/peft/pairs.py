"""One tiny model twice: in `transformers`, to be adapted by peft, and ours."""

import copy
import functools
import tempfile
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers

from jaxft import peft as jaxft_peft
from jaxft.checkpoint import hf as checkpoint
from jaxft.core import tree
from jaxft.models import decoder, heads
from jaxft.peft import formats, places, store
from tests.models import tiny

TOKENS = np.random.default_rng(0).integers(3, tiny.SIZES["vocab_size"], (2, 12)).astype(np.int32)


@functools.cache
def _pair(name: str) -> tuple[transformers.PreTrainedModel, checkpoint.Loaded]:
    model = tiny.model(name)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return model, checkpoint.load(directory, "float32")


def torch_model(name: str) -> transformers.PreTrainedModel:
    """A copy of the `transformers` model, free to be changed."""
    return copy.deepcopy(_pair(name)[0])


def ours(name: str) -> checkpoint.Loaded:
    """The same model loaded here."""
    return _pair(name)[1]


def model(name: str) -> SimpleNamespace:
    """What `jaxft.peft.adapt` asks of a model."""
    loaded = ours(name)
    return SimpleNamespace(params=loaded.params, names=loaded.names, config=loaded.config, tokenizer=None)


def logits(name: str, params: tree.Params, tokens_BT: np.ndarray = TOKENS) -> np.ndarray:
    """Our logits, float32[B, T, V]."""
    return np.asarray(_logits(ours(name).config, params, jnp.asarray(tokens_BT)))


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens_BT):
    hidden, _, _ = decoder.forward(config, params, tokens_BT, None, None)
    return heads.logits(config, heads.head_of(config, params), hidden)


def quietly(fn: Any, *args: Any, **kwargs: Any) -> Any:
    """peft warns of what these tests do on purpose (tied embeddings, fan_in_fan_out, saved embeddings)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fn(*args, **kwargs)


def peft_model(name: str, config: peft.PeftConfig) -> peft.PeftModel:
    """The model adapted by peft, every trained array off its initialisation."""
    torch.manual_seed(1)
    adapted = quietly(peft.get_peft_model, torch_model(name), config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return adapted.eval()


def peft_save(adapted: peft.PeftModel, directory: Path) -> Path:
    quietly(adapted.save_pretrained, str(directory))
    return directory


def peft_load(name: str, directory: Path, copies: str | None = None) -> peft.PeftModel:
    """What peft makes of a directory; any warning about missing or unexpected keys (but ``copies``) is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing|unexpected|Unexpected|not found).*")
        if copies is not None:
            told = rf"Found missing adapter keys[^\[]*\[('[^']*{copies}'(, )?)+\]\.$"
            warnings.filterwarnings("ignore", message=told)
        return peft.PeftModel.from_pretrained(torch_model(name), str(directory)).eval()


def torch_logits(adapted: Any, tokens_BT: np.ndarray = TOKENS) -> np.ndarray:
    """Of the tokens themselves: a prompt's own logits, which peft returns before them, are left out."""
    return quietly(tiny.logits, adapted, tokens_BT)[:, -tokens_BT.shape[1] :]


def moved(params: tree.Params, key: jax.Array, size: float = 0.1) -> tree.Params:
    """The parameters with every trained array off its initialisation; padding stays as it is, as in training."""

    def nudge(path: tuple, leaf: jax.Array, hit: bool) -> jax.Array:
        mine = jax.random.fold_in(key, zlib.crc32(tree.join(path).encode()))
        return leaf + size * jax.random.normal(mine, leaf.shape, leaf.dtype) if hit else leaf

    return jax.tree_util.tree_map_with_path(nudge, params, tree.trainable_mask(params))


def adapted(name: str, config: Any, key: jax.Array) -> tree.Params:
    """The model with a method (or a list of them) on it, off its initialisation, as training could have left it."""
    params = moved(jaxft_peft.adapt(model(name), key, config), key)
    for one in config if isinstance(config, list) else [config]:
        form = jaxft_peft.method_of(one).hf
        for row in places.rows(ours(name).names):
            w = None if row.kind == "norm" else places.get(params, row)
            if isinstance(form, formats.Format) and isinstance(w, form.leaf) and hasattr(w, "base"):
                params = places.put(params, row, _unpadded(form, row, ours(name).config.num_layers, w))
    return params


def _unpadded(form: formats.Format, row: Any, num_layers: int, w: Any) -> Any:
    """The leaf with zeros where nothing is stored."""
    layers = formats.layers_of(row, num_layers, formats.host(w))
    tensors = {f"{module}.{end}": array for module, layer in layers for end, array in form.write(layer).items()}
    return formats.filled(form, "", tensors, row, num_layers, w)


def load(name: str, directory: Path) -> tree.Params:
    loaded = ours(name)
    return store.load(loaded.params, loaded.names, loaded.config.num_layers, directory)


def save(name: str, params: tree.Params, directory: Path, **options: Any) -> Path:
    loaded = ours(name)
    return store.save(params, loaded.names, loaded.config.num_layers, directory, **options)
