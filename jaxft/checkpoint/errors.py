"""The one exception of the checkpoint room: what is wrong, where, what was got and expected, and the way out."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written as asked; nothing has been half-loaded or half-written."""

    def __init__(self, where: object, got: str, expected: str, remedy: str):
        super().__init__(str(where), got, expected, remedy)
        self.where, self.got, self.expected, self.remedy = str(where), got, expected, remedy

    def __str__(self) -> str:
        return f"{self.where}: got {self.got}; expected {self.expected}. {self.remedy}".rstrip()


def some(names: list[str], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
