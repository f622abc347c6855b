"""What every test runs under: eight simulated CPU devices, exact matmuls, strict promotion where it matters.

The environment is set before jax is imported. All workers, and all runs, share one compilation cache on disk.
"""

import ctypes
import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # the tests' time is the compiler's, on models this small: it is asked not to optimise
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # compiling for a TPU that is not here
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # two test processes otherwise abort on a lock file
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tests fork data workers

import jax  # noqa: E402  (the environment above must come first)
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

# The emitters alone would take half of the suite's time. The flag is read once, with the first device, and must be gone
# before the TPU's compiler, which does not know it, reads the same variable.
# JAX 0.11 has no other way to compile and refuses the flag.
given = os.environ["XLA_FLAGS"]
if jax.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] = f"{given} --xla_cpu_use_fusion_emitters=false"
jax.devices()
os.environ["XLA_FLAGS"] = given

jax.config.update("jax_default_matmul_precision", "highest")

STRICT_DTYPES = ("core", "models", "objectives")  # not training: optax's adam raises under it
STRICT_RANKS = ("objectives",)  # [B] against [B, T] is the classic bug there; in models per-feature scales broadcast


MAPPINGS = Path("/proc/self/maps")
MANY_MAPPINGS = 12_000
"""Linux lets a process have 65,530 and each compiled program takes several: past them XLA crashes. Here they are still
about two gigabytes."""
finished = itertools.count(1)


def pytest_runtest_teardown() -> None:
    """Drops the compiled programs of earlier tests before they are too many for a process."""
    if next(finished) % 20 == 0 and MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MANY_MAPPINGS:
        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # glibc would keep their memory


def _folder(request: pytest.FixtureRequest) -> str:
    return request.path.relative_to(ROOT / "tests").parts[0]


@pytest.fixture(autouse=True)
def strict_promotion(request: pytest.FixtureRequest):
    """Under tests/core, tests/models and tests/objectives an implicit dtype (or rank) promotion is an error."""
    folder = _folder(request)
    dtypes = "strict" if folder in STRICT_DTYPES else "standard"
    ranks = "raise" if folder in STRICT_RANKS else "allow"
    with jax.numpy_dtype_promotion(dtypes), jax.numpy_rank_promotion(ranks):
        yield


@pytest.fixture
def key() -> jax.Array:
    """A fixed PRNG key."""
    return jax.random.key(0)


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
