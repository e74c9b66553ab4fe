"""A tree of the pages in use and of those kept for later: sequences that begin alike share the pages of the beginning.

A node is a page and the tokens on it; the path from the root is the sequence so far. The keys and values of a token
depend on the tokens before it and on nothing else, so every page can be shared, whoever filled it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

from bardlet.errors import BardletError
from bardlet.inference.decoders.pages import PAGE, Pages

LOOKED_AT = 64
"""Children of a node that a search compares, the newest first."""
WORTH_COPYING = 8
"""Tokens from which a page that is shared in part is copied; fewer are read again."""


class Node:
    """A page and its tokens, which the keys and values on the page belong to. `users`: sequences that read it."""

    def __init__(self, page: int, tokens: list[int], parent: Node | None) -> None:
        self.page, self.tokens, self.parent, self.users = page, tokens, parent, 0
        self.children: dict[Node, None] = {}


class PrefixTree:
    """Gives out the pages of a pool. A page that no sequence reads any more is kept until its space is needed."""

    def __init__(self, pages: Pages) -> None:
        self.pages, self.root = pages, Node(-1, [], None)
        self.free = list(range(pages.number, 0, -1))
        self.idle: OrderedDict[Node, None] = OrderedDict()
        """Leaves without a user, the one that was left first in front."""

    def start(self, ids: Sequence[int]) -> tuple[list[Node], int]:
        """Return (nodes, tokens): the pages on which the first `tokens` of ids are already, now used once more."""
        nodes, length, node = [], 0, self.root
        while True:
            shared, best = self._best_child(node, ids, length)
            if best is None or shared < PAGE:
                break
            node = best
            nodes.append(self._use(node))
            length += shared
        if best is not None and shared >= WORTH_COPYING and (self.free or len(self.idle) > (best in self.idle)):
            self._use(best)  # keep it while a page is found for the copy
            nodes.append(self.extend(node))
            self.pages.copy(nodes[-1].page, best.page, shared)
            nodes[-1].tokens.extend(ids[length : length + shared])
            self._release(best)
            length += shared
        return nodes, length

    def extend(self, parent: Node | None) -> Node:
        """Return a new page after `parent` (None: the first of a sequence), without tokens, used once."""
        if not self.free:
            self._evict()
        page, parent = self.free.pop(), parent or self.root
        self.pages.clear(page)
        node = Node(page, [], parent)
        self.idle.pop(parent, None)
        parent.children[node] = None
        return self._use(node)

    def leave(self, nodes: Sequence[Node]) -> None:
        """End the use of these nodes, the path of a sequence."""
        for node in reversed(nodes):
            self._release(node)

    def forget(self, nodes: Sequence[Node]) -> None:
        """Free the pages of a sequence that nothing else uses, for example because they hold a NaN."""
        self.leave(nodes)
        for node in reversed(nodes):
            if node in self.idle:
                self._drop(node)

    def _best_child(self, node: Node, ids: Sequence[int], length: int) -> tuple[int, Node | None]:
        """Return the number of tokens after `length` that a child shares, and the child that shares the most."""
        rest = list(ids[length : length + PAGE])
        best, found = 0, None
        for child in islice(reversed(node.children), LOOKED_AT):
            if (shared := common(rest, child.tokens)) > best:
                best, found = shared, child
                if shared == len(rest):
                    break
        return best, found

    def _use(self, node: Node) -> Node:
        node.users += 1
        self.idle.pop(node, None)
        return node

    def _release(self, node: Node) -> None:
        node.users -= 1
        if not node.users and not node.children:
            self.idle[node] = None

    def _evict(self) -> None:
        if not self.idle:
            raise BardletError(f"internal error: all {self.pages.number} pages of keys and values are in use")
        self._drop(next(iter(self.idle)))

    def _drop(self, node: Node) -> None:
        """Free the page of an idle leaf."""
        del self.idle[node]
        self.free.append(node.page)
        if parent := node.parent:
            del parent.children[node]
            if parent is not self.root and not parent.users and not parent.children:
                self.idle[parent] = None


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of tokens with which both sequences begin."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next(i for i in range(length) if a[i] != b[i])
