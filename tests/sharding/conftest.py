"""What compiling for a TPU that is not here needs."""

from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture
def for_a_chip_elsewhere() -> Iterator[None]:
    """No cache on disk, which cannot read such a program back, and the precision that users run with."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    with jax.default_matmul_precision("default"):
        yield
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()
