"""OpenAssistant's trees: messages that refer to each other become conversations, or pairs of ranked replies.

A row is a message (`message_id`, `parent_id`, `text`, `role`, `rank`, ...), or a whole tree with its replies nested in
it, as oasst1 and oasst2 are published. Rows refer to each other, so all are read first. What comes out are rows of the
formats `messages` and `preference`, each at the place of the reply that it ends with. Deleted messages, those that
reviewers called spam (`review_result` false), and bad ones are left out with all that answers them (Köpf et al. 2023,
arXiv:2304.07327).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from jaxft.data.errors import DataError, short
from jaxft.data.records import SKIP, Memory, Records, Row

ROLES = {"prompter": "user", "assistant": "assistant"}
UNRANKED = 2**31
TREE = "message_tree_id"
"""The column that all rows of a tree share: they are held out together."""


@dataclass(eq=False)
class Node:
    """A message with what answers it, in the order of the file."""

    row: Row
    replies: list["Node"] = field(default_factory=list)

    @property
    def message(self) -> dict[str, Any]:
        """As chats have it."""
        return {"role": ROLES[self.row.fields["role"]], "content": self.row.fields["text"]}

    @property
    def rank(self) -> int:
        """Its place among its siblings, 0 the best; those without one come last."""
        rank = self.row.fields.get("rank")
        return UNRANKED if rank is None else int(rank)

    def ranked(self) -> list["Node"]:
        """Its replies, best first."""
        return sorted(self.replies, key=lambda node: node.rank)


def hold(rows: list[Row | DataError]) -> bool:
    """Whether the first good row is a message of a tree, or a tree."""
    first = next((row.fields for row in rows if isinstance(row, Row)), {})
    return {"message_id", "role", "text"} <= first.keys() or nested(first)


def nested(fields: dict[str, Any]) -> bool:
    """Whether a row is a whole tree."""
    return isinstance(fields.get("prompt"), dict) and "message_id" in fields["prompt"]


def flatten(source: Records, paths: str, pairs: bool) -> Records:
    """Conversations, or pairs of replies, in the order of the trees; bad rows stay in front.

    A limit of the source is one of what comes out, as cutting the messages would cut trees."""
    whole = sum(len(part) for part in source.parts)
    limit = source.size if source.size < whole else None
    messages: list[Row] = []
    found: list[Row | DataError] = []
    for row in Records(source.parts, whole, source.columns).rows(0, whole):
        try:
            if isinstance(row, DataError):
                raise row
            messages += [checked(each) for each in unnested(row)]
        except DataError as error:
            found.append(error)
    roots, errors = grown(messages)
    found += errors
    for root in roots:
        found += compared(root, paths) if pairs else told(root, paths)
    size = len(found) if limit is None else min(limit, len(found))
    return Records((Memory(tuple(found)),), size, {})


def unnested(row: Row) -> Iterator[Row]:
    """The messages of a row, each with its `parent_id`."""
    if not nested(row.fields):
        yield row
        return
    left: list[tuple[dict[str, Any], str | None]] = [(row.fields["prompt"], None)]
    while left:
        message, parent = left.pop()
        replies = message.get("replies") or []
        if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
            raise DataError(row.where, "prompt.replies", short(replies), "a list of messages", SKIP)
        yield Row({**message, "parent_id": parent}, row.where)
        left += [(reply, message.get("message_id")) for reply in reversed(replies)]


def checked(row: Row) -> Row:
    """The row, if it is a message."""
    fields = row.fields
    for name in ("message_id", "text"):
        if not isinstance(fields.get(name), str):
            raise DataError(row.where, name, short(fields.get(name)), "a string", SKIP)
    if fields.get("role") not in ROLES:
        raise DataError(row.where, "role", short(fields.get("role")), f"one of {', '.join(ROLES)}", SKIP)
    rank = fields.get("rank")
    # A column that holds nulls reaches us as floats from some writers.
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int | float) or rank != int(rank)):
        raise DataError(row.where, "rank", short(rank), "a whole number, 0 the best", SKIP)
    return row


def grown(messages: Iterable[Row]) -> tuple[list[Node], list[DataError]]:
    """The roots of all trees, and the messages that do not fit in one."""
    nodes: dict[str, Node] = {}
    errors: list[DataError] = []
    for row in messages:
        name = row.fields["message_id"]
        if name in nodes:
            expected = f"one message of this id (the other is {nodes[name].row.where})"
            errors.append(DataError(row.where, "message_id", short(name), expected, SKIP))
        else:
            nodes[name] = Node(row)
    roots = []
    for node in nodes.values():
        fields = node.row.fields
        parent = fields.get("parent_id")
        above = nodes.get(parent) if parent is not None else None
        if parent is not None and above is None:
            got = f"{short(parent)}, which is no message of the data"
            errors.append(DataError(node.row.where, "parent_id", got, "the id of the message it answers", SKIP))
        elif circular(node, nodes):
            expected = "the id of the message it answers"
            errors.append(DataError(node.row.where, "parent_id", f"{short(parent)}, in a circle", expected, SKIP))
        elif (above.row.fields["role"] if above else "assistant") == fields["role"]:
            got = f"{fields['role']} {'in answer to itself' if above else 'as the first message'}"
            expected = "prompter and assistant in turn"
            errors.append(DataError(node.row.where, "role", got, expected, SKIP))
        elif fields.get("deleted") is not True and fields.get("review_result") is not False:
            (above.replies if above else roots).append(node)
    return roots, errors


def circular(node: Node | None, nodes: dict[str, Node]) -> bool:
    """Whether the way up from a message never ends."""
    seen: set[int] = set()
    while node is not None and id(node) not in seen:
        seen.add(id(node))
        node = nodes.get(node.row.fields.get("parent_id") or "")
    return node is not None


def told(root: Node, paths: str) -> Iterator[Row]:
    """The conversations of a tree; each ends with the last that the assistant says on its path."""
    left = [(root, [root])]
    while left:
        node, path = left.pop()
        replies = node.ranked()[: 1 if paths == "best" else None]
        left += [(reply, [*path, reply]) for reply in reversed(replies)]
        if node.row.fields["role"] == "assistant" and not any(reply.replies for reply in replies):
            yield Row({**about(node, root), "messages": [each.message for each in path]}, node.row.where)


def compared(root: Node, paths: str) -> Iterator[Row]:
    """Pairs of replies of different rank to the same prompt; unranked ones are not compared."""
    left = [(root, [root.message])]
    while left:
        node, messages = left.pop()
        left += [(reply, [*messages, reply.message]) for reply in reversed(node.replies)]
        if node.row.fields["role"] != "prompter":
            continue
        ranked = [reply for reply in node.ranked() if reply.rank != UNRANKED]
        pairs = combinations(ranked, 2) if paths == "all" else [(ranked[0], ranked[-1])] if ranked else []
        for better, worse in pairs:
            if better.rank < worse.rank:
                fields = {"prompt": messages, "chosen": [better.message], "rejected": [worse.message]}
                yield Row(about(better, root) | fields, better.row.where)


def about(node: Node, root: Node) -> dict[str, Any]:
    """The other columns of a reply, and its tree."""
    kept = {name: value for name, value in node.row.fields.items() if name not in ("text", "role", "replies")}
    return kept | {TREE: root.row.fields["message_id"]}
