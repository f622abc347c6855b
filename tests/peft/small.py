"""Settings of the methods whose defaults are too large for models of 16 to 128 features."""

from typing import Any

SMALL: dict[str, dict[str, Any]] = {
    "full": {"select": "norms"},
    "last_layers": {"n": 1},
    "trainable_tokens": {"tokens": (3, 5, 8), "head": True},
    "road": {"group_size": 16},
    "vera": {"rank": 16},
    "randlora": {"rank": 12, "alpha": 12},
    "fourierft": {"frequencies": 20},
    "shira": {"rank": 4},
    "miss": {"rank": 12},
}
"""By name of the method; the defaults otherwise."""
