"""What the border raises."""


class ConfigError(ValueError):
    """The configuration is wrong. Its message lists every problem found: where, what, got, expected, remedy."""
