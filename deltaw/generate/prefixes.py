"""Keys and values of beginnings that rows have had: kept when they leave, and read by later rows that begin alike.

A tree per key (what the rows' update is, by content), in which a path from the root spells tokens:

    root ── "system prompt" ─┬─ "user: hello" ── "answer 1"        a node holds keys and values of its own tokens
                             └─ "user: bye"

A row takes as much of a path as its prompt spells, to the token, also from within a node; what it adds becomes a
branch, for which a node is cut in two where it must be. So a chat's next turn goes on from where the last one ended,
and many chats share one system prompt that is kept once.

Nothing is known by an adapter's name or by its number in the model, which others take after it: a key says what the
update *is*. A row without one (b"") neither gives nor takes.

At most `limit` tokens are kept; where more would be, the leaves that were last used longest ago go. A node counts as at
least `SMALL` tokens, since it also costs as many tensors as the model has layers.

Rejected: blocks of 16 tokens found by a hash of all that comes before them (vLLM). They need no cutting, but the end of
a prompt that fills no block is lost, and a block is as many tensors as a node here.

Letters: N tokens of a node, K key/value heads, E head size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

SMALL = 16  # tokens that one doesn't bother about

Stored = Mapping[nn.Module, Tensor]  # by layer: [2, K, N, E], keys and values


@dataclass(eq=False)
class Node:
    """Tokens, what is stored of them, and what came after them, by its first token."""

    tokens: tuple[int, ...] = ()
    stored: Stored = field(default_factory=dict)
    parent: "Node | None" = None
    children: dict[int, "Node"] = field(default_factory=dict)
    used: int = 0

    @property
    def cost(self) -> int:
        return max(len(self.tokens), SMALL)


class Prefixes:
    """What is kept, and how many tokens' computation it has spared (`reused`)."""

    def __init__(self, limit: int) -> None:
        self.limit, self.cost, self.reused = limit, 0, 0
        self._roots: dict[bytes, Node] = {}
        self._clock = 0

    def count(self, key: bytes, tokens: tuple[int, ...]) -> int:
        """How many of the tokens, from the first on, are kept."""
        return sum(count for _, count in self._path(key, tokens))

    def parts(self, key: bytes, tokens: tuple[int, ...], first: int) -> Iterator[tuple[int, Stored]]:
        """What is kept of the tokens from `first` on: the place of each part's first token, and the part."""
        self._clock += 1
        at = 0
        for node, count in self._path(key, tokens):
            node.used = self._clock
            skip = min(count, max(0, first - at))
            if skip < count:
                self.reused += count - skip
                yield at + skip, {layer: stored[:, :, skip:count] for layer, stored in node.stored.items()}
            at += count

    def keep(self, key: bytes, tokens: tuple[int, ...], stored: Mapping[nn.Module, Tensor]) -> None:
        """Keep what `stored` holds of the tokens, [2, K, at least N, E] by layer: a copy of what isn't kept yet."""
        tokens = tokens[: self.limit // 2]  # one row's shan't drive out all others'
        if not key or not tokens:
            return
        self._clock += 1
        node, at = self._roots.setdefault(key, Node()), 0
        for child, count in self._path(key, tokens):
            node = child if count == len(child.tokens) else self._cut(child, count)
            node.used = self._clock
            at += count
        if at < len(tokens):
            new = {layer: kept[:, :, at : len(tokens)].clone() for layer, kept in stored.items()}
            self._add(Node(tokens[at:], new, node, used=self._clock))
        self._shrink()

    def clear(self) -> None:
        self._roots.clear()
        self.cost = 0

    def _path(self, key: bytes, tokens: tuple[int, ...]) -> list[tuple[Node, int]]:
        """The nodes that spell the tokens, as far as they do, each with how many of its tokens that are."""
        node, at, path = self._roots.get(key), 0, list[tuple[Node, int]]()
        while node is not None and at < len(tokens):
            node = node.children.get(tokens[at])
            if node is not None:
                count = common(node.tokens, tokens[at : at + len(node.tokens)])
                path.append((node, count))
                at += count
                if count < len(node.tokens):
                    break
        return path

    def _cut(self, node: Node, count: int) -> Node:
        """Make two of a node, of which the first has `count` tokens, and return that one."""
        assert node.parent is not None
        self.cost -= node.cost
        parts = [{layer: kept[:, :, part].clone() for layer, kept in node.stored.items()}
                 for part in (slice(0, count), slice(count, None))]  # fmt: skip
        front = Node(node.tokens[:count], parts[0], node.parent, used=node.used)
        node.tokens, node.stored, node.parent = node.tokens[count:], parts[1], front
        self._add(front)
        self._add(node)
        return front

    def _add(self, node: Node) -> None:
        assert node.parent is not None
        node.parent.children[node.tokens[0]] = node
        self.cost += node.cost

    def _shrink(self) -> None:
        """Let go of the leaves that were used longest ago."""
        while self.cost > self.limit:
            leaf = min((node for node in self._nodes() if not node.children), key=lambda node: node.used)
            assert leaf.parent is not None
            del leaf.parent.children[leaf.tokens[0]]
            self.cost -= leaf.cost
        for key in [key for key, root in self._roots.items() if not root.children]:
            del self._roots[key]

    def _nodes(self) -> Iterator[Node]:
        """All but the roots."""
        waiting = [child for root in self._roots.values() for child in root.children.values()]
        while waiting:
            node = waiting.pop()
            yield node
            waiting += node.children.values()


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """With how many equal tokens two tuples begin."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:  # they are equal up to low and not up to high
        middle = (low + high) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle)
    return low
