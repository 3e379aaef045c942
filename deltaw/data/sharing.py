"""Which examples of a step begin alike, so that their beginning is computed once (kernels/tree.py).

Two examples share their first P tokens where they have P + 1 tokens in common and train the same ones of these: row P
of each is its own, because the label of row P − 1 is the last that they have in common, and the next one differs. So a
copy of another example still has one token of its own, and a prefix's labels are labels of all who share it.

    examples that begin alike in their first LEAST + 1 tokens          one dictionary; most data stops here
    sorted by their tokens, and what neighbours have in common         a trie without a node per token
    from the top: a node that lies LEAST tokens below the last one     becomes a document, which others continue

The examples of one tree become neighbours, where the first of them stood; the others stay in their order. Then the
step is cut into batches anew: `capacity` bounds what is computed, so a batch holds more examples than it did. A tree
that is cut in two computes its prefix in both.

What it saves must pay: a row that sees a prefix has one more part in its softmax, and a batch is laid out twice.
Measured (CPU time of one thread, SmolLM2-135M, which is small and so has dear attention; steps of 32 rows of 30 tokens
behind a common beginning; `python -m benchmarks.shared_prefix sweep --cpu`):

    common tokens        6       8      12      16      32
    saved tokens      16 %    21 %    28 %    34 %    50 %
    times as fast     1.05    1.07    1.25    1.35    1.70

So a tenth of a step goes into sharing, and a step shares at least `WORTH` of its tokens or nothing: what gains less
stays what it was, to the bit. A prefix has at least `LEAST` tokens, since each level of a tree costs the same again.

Rejected: one level of prefixes only (pairs of preferences share a prompt, and all of them a system prompt), looking
beyond the step (which examples a step takes is the shuffle's business), and a trie with a node for every token (a step
of Python for each). What it costs: 2 µs for a row that shares nothing, 12 for one that shares 200 tokens.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np
import torch

from deltaw.base.batch import Batch
from deltaw.data.example import Example
from deltaw.data.pack import labelled
from deltaw.kernels.logprobs import IGNORE
from deltaw.kernels.tree import NO_PARENT

LEAST = 16  # tokens of a prefix
WORTH = 0.15  # of a step's tokens, that must be saved


@dataclass(frozen=True, eq=False)
class Node:
    """A prefix of `depth` tokens that examples share."""

    depth: int


Chain = tuple[Node, ...]  # the prefixes of an example, the shortest first


@dataclass(frozen=True)
class Shared:
    """Examples in the order in which they are laid out; of each its prefixes, its number among those that were given,
    and whether a batch may begin with it."""

    examples: list[Example]
    chains: list[Chain]
    numbers: list[int]
    begins: list[bool]

    @staticmethod
    def of(examples: Sequence[Example], sizes: Sequence[int] = ()) -> "Shared | None":
        """What these share; None where it doesn't pay. `sizes`: how many of them, in order, are kept together in a
        batch (the two answers of a pair); empty: each is by itself."""
        units = _units(len(examples), sizes)
        alike = _beginning_alike(examples, units)
        if not alike:
            return None
        chains: dict[int, Chain] = {}  # of a unit
        trees: dict[Node | int, list[int]] = {}  # by what all of it share, or the unit itself
        for members in alike:
            for number, chain in _walk(members, [_keys_of_all(examples, units[member]) for member in members]):
                chains[number] = chain
                trees.setdefault(chain[0] if chain else number, []).append(number)
        trees |= {number: [number] for number in range(len(units)) if number not in chains}
        order = [unit for tree in sorted(trees.values(), key=min) for unit in tree]
        numbers = [number for unit in order for number in units[unit]]
        shared = Shared(
            [examples[number] for number in numbers],
            [chains.get(unit, ()) for unit in order for _ in units[unit]],
            numbers,
            [not at for unit in order for at in range(len(units[unit]))],
        )
        tokens = sum(len(example.tokens) for example in examples)
        return shared if tokens - sum(shared.costs()) >= WORTH * tokens else None

    def costs(self) -> list[int]:
        """The tokens that each example adds to what is computed, laid out one after the other."""
        costs, before = list[int](), frozenset[Node]()
        for example, chain in zip(self.examples, self.chains, strict=True):
            common = [node.depth for node in chain if node in before]
            costs.append(len(example.tokens) - max(common, default=0))
            before = frozenset(chain)
        return costs

    def batches(self, capacity: int, ranks: int = 1) -> "list[Shared]":
        """Cut where more than `capacity` tokens would be computed, into at least `ranks` where they can be."""
        parts = min(ranks, sum(self.begins))
        while len(cuts := self._cuts(capacity)) - 1 < parts:
            capacity = min(capacity - 1, max(sum(self.costs()) // parts, capacity * 7 // 8))
        every = self.examples, self.chains, self.numbers, self.begins
        return [Shared(*(values[a:b] for values in every)) for a, b in pairwise(cuts)]  # type: ignore[arg-type]

    def _cuts(self, capacity: int) -> list[int]:
        """Where the batches begin, and the end. What is kept together may be larger alone."""
        costs, cuts, taken = self.costs(), [0], 0
        bounds = [number for number, begins in enumerate(self.begins) if begins]
        for begin, end in pairwise([*bounds, len(costs)]):
            cost = sum(costs[begin:end])
            if begin > cuts[-1] and taken + cost > capacity:
                cuts.append(begin)
                taken, cost = 0, cost - costs[begin] + len(self.examples[begin].tokens)
            taken += cost
        return [*cuts, len(costs)]

    def documents(self) -> list[Example]:
        """The documents of the batch, each as an example by itself: so much is computed."""
        batch, whole = self.pack(), self.examples[0]
        trained_T = np.append(False, batch.labels_T.numpy()[:-1] != IGNORE)
        trained_T[batch.starts[:-1]] = False
        tokens_T = batch.tokens_T.numpy().astype(np.int32)
        return [replace(whole, tokens=tokens_T[a:b], loss_mask=trained_T[a:b]) for a, b in pairwise(batch.starts)]

    def pack(self) -> Batch:
        """The batch of these examples."""
        uses = Counter(node for chain in self.chains for node in chain)
        tokens, labels, starts, parents = list[np.ndarray](), list[np.ndarray](), [0], list[int]()
        open_: list[tuple[Node, int]] = []  # the prefixes that the last document continues, and their documents

        def lay(example: Example, of_example: np.ndarray, end: int) -> None:
            begin, parent = (open_[-1][0].depth, open_[-1][1]) if open_ else (0, NO_PARENT)
            tokens.append(example.tokens[begin:end])
            labels.append(of_example[begin:end])
            starts.append(starts[-1] + end - begin)
            parents.append(parent)

        for example, whole in zip(self.examples, self.chains, strict=True):
            # A prefix that one example has here is its own; one that goes on for all alike is a part of the longer one.
            used = [*(uses[node] for node in whole), 1]
            wanted = [node for node, here, deeper in zip(whole, used, used[1:], strict=False) if here > deeper]
            of_example = labelled(example)
            while open_ and open_[-1][0] not in wanted:
                open_.pop()
            for node in wanted[len(open_) :]:
                lay(example, of_example, node.depth)
                open_.append((node, len(parents) - 1))
            lay(example, of_example, len(example.tokens))
        parts = tuple(example.part for example in self.examples)
        return Batch.of(
            torch.from_numpy(np.concatenate(tokens).astype(np.int64)),
            starts,
            torch.from_numpy(np.concatenate(labels)),
            parents=parents,
            origins=tuple(example.origin for example in self.examples),
            parts=parts if any(parts) else (),
        )


def _units(count: int, sizes: Sequence[int]) -> list[range]:
    """The numbers of examples that are kept together."""
    bounds = [0, *accumulate(sizes or [1] * count)]
    return [range(begin, end) for begin, end in pairwise(bounds)]


def _beginning_alike(examples: Sequence[Example], units: Sequence[range]) -> list[list[int]]:
    """The numbers of units whose examples' first LEAST + 1 tokens are alike, and trained alike, where the examples are
    several."""
    alike: dict[bytes, list[int]] = {}
    for number, unit in enumerate(units):
        heads = {_head(examples[one]) for one in unit}
        if len(heads) == 1 and b"" not in heads:
            alike.setdefault(heads.pop(), []).append(number)
    return [numbers for numbers in alike.values() if sum(len(units[number]) for number in numbers) > 1]


def _head(example: Example) -> bytes:
    """Its first LEAST + 1 tokens, and which are trained; empty where it has fewer."""
    if len(example.tokens) <= LEAST:
        return b""
    return example.tokens[: LEAST + 1].tobytes() + example.loss_mask[1 : LEAST + 1].tobytes()


def _keys_of_all(examples: Sequence[Example], unit: range) -> tuple[np.ndarray, bool]:
    """(the keys that all examples of a unit have in common, whether they are several)."""
    first, *others = (_keys(examples[one]) for one in unit)
    common = min((_in_common(first, other) for other in others), default=len(first))
    return first[:common], bool(others)


def _keys(example: Example) -> np.ndarray:
    """A number per token that says which it is and whether it is trained. Big-endian: as bytes they sort as numbers."""
    keys = example.tokens.astype(np.uint32) << 1
    keys[1:] |= example.loss_mask[1:]
    return keys.astype(">u4")


def _walk(members: Sequence[int], keys: Sequence[tuple[np.ndarray, bool]]) -> list[tuple[int, Chain]]:
    """The members in the order of a walk through their trie, and the prefixes of each. `keys`: what it begins with, and
    whether several examples do."""
    order = sorted(range(len(members)), key=lambda one: keys[one][0].tobytes())
    common = [_in_common(keys[a][0], keys[b][0]) for a, b in pairwise(order)]
    chains: list[Chain] = [()] * len(order)
    todo: list[tuple[int, int, Chain]] = [(0, len(order), ())]
    while todo:
        first, end, chain = todo.pop()
        own, several = keys[order[first]]
        least = min(common[first : end - 1]) if end - first > 1 else len(own)
        if (end - first > 1 or several) and least - 1 - (chain[-1].depth if chain else 0) >= LEAST:
            chain = (*chain, Node(least - 1))
        if end - first > 1:
            splits = [first, *(at + 1 for at in range(first, end - 1) if common[at] == least), end]
            todo += [(a, b, chain) for a, b in pairwise(splits)]
        else:
            chains[first] = chain
    return [(members[one], chain) for one, chain in zip(order, chains, strict=True)]


def _in_common(a: np.ndarray, b: np.ndarray) -> int:
    """How many of their first entries are the same."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    at = int(differ.argmax())
    return at if differ[at] else length
