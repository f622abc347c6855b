"""Models with a scalar head that a run reads beside its policy: reward models, and what a value model begins from.

An adapter on the policy's own base is put on the very arrays of that base, which then exist once for all of them;
anything else is a model of its own.
"""

from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from jaxft import model as model_
from jaxft import scoring
from jaxft.border.errors import ConfigError
from jaxft.checkpoint import tokenizer
from jaxft.cli import heads, target
from jaxft.cli.target import Target
from jaxft.config import RunConfig
from jaxft.core import tree
from jaxft.model import Model
from jaxft.rollout import distil
from jaxft.sharding import rules


class Scorer(NamedTuple):
    """A model with a scalar head."""

    model: Model
    """Without the adapter."""
    adapter: Path | None
    shared: bool
    """Whether its arrays are those of the policy's base."""
    config: RunConfig
    """That of the run that made it, as far as it is known."""

    def params(self, mesh: Mesh | None) -> tree.Params:
        """Its parameters, with the adapter on them."""
        params = self.model.params if self.adapter is None else model_.load_adapter(self.model, self.adapter)
        return params if mesh is None else jax.device_put(params, rules.shardings(params, mesh))


def find(
    key: str, path: str, config: RunConfig, base: Model, mesh: Mesh | None, *, revision: str | None, quantize: str
) -> Scorer:
    """The scorer at ``path``: a run's folder, that of an adapter or a whole model, or a hub id. A language model comes
    back as it is. ``base``: the policy's, with its parameters. Raises ConfigError that names ``key``."""
    packed = [] if quantize == "none" else [f"quant.method={quantize}"]
    named = [] if revision is None else [f"model.revision={revision}"]
    try:
        found = target.find(path, [f"model.dtype={base.params['embed']['tokens'].dtype}", *named, *packed])
    except ConfigError as error:
        raise ConfigError(f"`{key}`: {error}") from None
    if _on_base(found, config, base):
        if packed:
            raise ConfigError(f"`{key}`: an adapter on the policy's base, which is packed as `quant` says: no quantize")
        model = heads.placed(scoring.headed(base, init="zeros"), mesh)
        return Scorer(model, found.adapter, True, found.config)
    model = target.model(found, mesh)
    return Scorer(model, found.adapter, False, found.config)


def _on_base(found: Target, config: RunConfig, base: Model) -> bool:
    """Whether it is an adapter on the policy's base."""
    if found.adapter is None or config.model.init != "pretrained":
        return False
    theirs, ours = found.config.model, config.model
    if (_place(theirs.path), theirs.revision) != (_place(ours.path), ours.revision):
        return False
    brought = tokenizer.load(found.adapter)  # one with tokens of its own has rows that the base lacks
    return brought is None or brought.get_vocab() == base.tokenizer.get_vocab()


def _place(path: str) -> str:
    """The same text for all ways to write the same folder."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def same_tokens(model: Model, base: Model, what: str) -> None:
    """Raises ValueError, naming `what.path`, for a model whose tokens are not the policy's."""
    distil.shared_vocabulary(base.config, base.tokenizer, model.config, model.tokenizer, what)
