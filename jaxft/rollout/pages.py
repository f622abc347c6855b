"""Which page of the cache belongs to whom: plain host code.

Rows that begin with the same tokens hold the same full pages; a page returns when no one holds it.
"""

from collections.abc import Iterable, Sequence


class Pages:
    """The pages of one shard of the cache, numbered from 0."""

    def __init__(self, count: int):
        self.free = list(range(count - 1, -1, -1))
        self.holders = [0] * count

    def take(self, count: int) -> list[int]:
        """Pages for one holder. Raises ValueError if there are too few; see `free`."""
        if count > len(self.free):
            raise ValueError(f"cache: {count} pages asked for and {len(self.free)} free")
        taken = [self.free.pop() for _ in range(count)]
        for page in taken:
            self.holders[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One more holder of each."""
        for page in pages:
            self.holders[page] += 1

    def give_back(self, pages: Sequence[int]) -> None:
        """One holder less of each; a page that nobody holds is free."""
        for page in pages:
            self.holders[page] -= 1
            if self.holders[page] == 0:
                self.free.append(page)
