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

What it saves must pay. A row that sees a prefix costs one more part of its softmax. Measured on 2 cores (SmolLM2-135M,
bfloat16, one thread of CPU time, forward and backward; benchmarks/shared_prefix.py): SEE_BELOW. So a prefix has at
least `LEAST` tokens, and a step shares at least `WORTH` of its tokens or nothing: a step that gains less stays what it
was, to the bit.

Rejected: one level of prefixes only (pairs of preferences share a prompt, and all of them a system prompt), looking
beyond the step (which examples a step takes is the shuffle's business), and a trie of single tokens (50 times as slow
in Python). What it costs: 5 µs for a row that shares nothing, about 15 for one that does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from deltaw.base.batch import Batch
from deltaw.data.example import Example
from deltaw.data.pack import labelled
from deltaw.kernels.logprobs import IGNORE
from deltaw.kernels.tree import NO_PARENT

LEAST = 16  # tokens of a prefix
WORTH = 0.05  # of a step's tokens, that must be saved


@dataclass(frozen=True)
class Node:
    """A prefix of `depth` tokens that examples share. Two are the same where they are one object."""

    depth: int


Chain = tuple[Node, ...]  # the prefixes of an example, the shortest first


@dataclass(frozen=True)
class Shared:
    """Examples in the order in which they are laid out, and the prefixes of each."""

    examples: list[Example]
    chains: list[Chain]

    @staticmethod
    def of(examples: Sequence[Example]) -> "Shared | None":
        """What these share; None where it doesn't pay."""
        alike = _beginning_alike(examples)
        if not alike:
            return None
        chains, trees = dict[int, Chain](), dict[int, list[int]]()  # of an example; by the node that all of it share
        for members in alike:
            for number, chain in _walk(members, [_keys(examples[member]) for member in members]):
                chains[number] = chain
                trees.setdefault(id(chain[0]) if chain else -number - 1, []).append(number)
        alone = [[number] for number in range(len(examples)) if number not in chains]
        numbers = [number for tree in sorted([*trees.values(), *alone], key=min) for number in tree]
        shared = Shared([examples[number] for number in numbers], [chains.get(number, ()) for number in numbers])
        tokens = sum(len(example.tokens) for example in examples)
        return shared if tokens - sum(shared.costs()) >= WORTH * tokens else None

    def costs(self) -> list[int]:
        """The tokens that each example adds to what is computed, laid out one after the other."""
        costs, before = list[int](), frozenset[int]()
        for example, chain in zip(self.examples, self.chains, strict=True):
            common = [node.depth for node in chain if id(node) in before]
            costs.append(len(example.tokens) - max(common, default=0))
            before = frozenset(map(id, chain))
        return costs

    def batches(self, capacity: int, ranks: int = 1) -> "list[Shared]":
        """Cut where more than `capacity` tokens would be computed, into at least `ranks` where there are as many
        examples."""
        parts = min(ranks, len(self.examples))
        while len(cuts := self._cuts(capacity)) - 1 < parts:
            capacity = min(capacity - 1, max(sum(self.costs()) // parts, capacity * 7 // 8))
        return [Shared(self.examples[a:b], self.chains[a:b]) for a, b in pairwise(cuts)]

    def _cuts(self, capacity: int) -> list[int]:
        """Where the batches begin, and the end. An example alone may be larger."""
        cuts, taken = [0], 0
        for number, cost in enumerate(self.costs()):
            if number > cuts[-1] and taken + cost > capacity:
                cuts.append(number)
                taken, cost = 0, len(self.examples[number].tokens)
            taken += cost
        return [*cuts, len(self.examples)]

    def documents(self) -> list[Example]:
        """The documents of the batch, each as an example by itself: so much is computed."""
        batch, whole = self.pack(), self.examples[0]
        trained_T = np.append(False, batch.labels_T.numpy()[:-1] != IGNORE)
        trained_T[batch.starts[:-1]] = False
        tokens_T = batch.tokens_T.numpy().astype(np.int32)
        return [replace(whole, tokens=tokens_T[a:b], loss_mask=trained_T[a:b]) for a, b in pairwise(batch.starts)]

    def pack(self) -> Batch:
        """The batch of these examples."""
        uses: dict[int, int] = {}
        for chain in self.chains:
            for node in chain:
                uses[id(node)] = uses.get(id(node), 0) + 1
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
            used = [*(uses[id(node)] for node in whole), 1]
            wanted = [node for node, here, deeper in zip(whole, used, used[1:], strict=False) if here > deeper]
            of_example = labelled(example)
            while open_ and not any(open_[-1][0] is node for node in wanted):
                open_.pop()
            for node in wanted[len(open_) :]:
                lay(example, of_example, node.depth)
                open_.append((node, len(parents) - 1))
            lay(example, of_example, len(example.tokens))
        return Batch.of(
            torch.from_numpy(np.concatenate(tokens).astype(np.int64)),
            starts,
            torch.from_numpy(np.concatenate(labels)),
            parents=parents,
            origins=tuple(example.origin for example in self.examples),
        )


def _beginning_alike(examples: Sequence[Example]) -> list[list[int]]:
    """The numbers of examples whose first LEAST + 1 tokens are alike, and trained alike, where they are several."""
    alike: dict[bytes, list[int]] = {}
    for number, example in enumerate(examples):
        if len(example.tokens) > LEAST:
            head = example.tokens[: LEAST + 1].tobytes() + example.loss_mask[1 : LEAST + 1].tobytes()
            alike.setdefault(head, []).append(number)
    return [numbers for numbers in alike.values() if len(numbers) > 1]


def _keys(example: Example) -> np.ndarray:
    """A number per token that says which it is and whether it is trained. Big-endian: as bytes they sort as numbers."""
    keys = example.tokens.astype(np.uint32) << 1
    keys[1:] |= example.loss_mask[1:]
    return keys.astype(">u4")


def _walk(members: Sequence[int], keys: Sequence[np.ndarray]) -> list[tuple[int, Chain]]:
    """The members in the order of a walk through their trie, and the prefixes of each."""
    order = sorted(range(len(members)), key=lambda one: keys[one].tobytes())
    common = [_in_common(keys[a], keys[b]) for a, b in pairwise(order)]
    chains: list[Chain] = [()] * len(order)
    todo: list[tuple[int, int, Chain]] = [(0, len(order), ())]
    while todo:
        first, end, chain = todo.pop()
        if end - first > 1:
            least = min(common[first : end - 1])
            if least - 1 - (chain[-1].depth if chain else 0) >= LEAST:
                chain = (*chain, Node(least - 1))
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
