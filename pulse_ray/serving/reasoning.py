"""Reasons for histories that the store has none for: a tree grown on the spot, and its best leaf."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from pulse_ray.catalogue import Catalogue
from pulse_ray.config import Config
from pulse_ray.generation import names
from pulse_ray.generation.gates import Flaw
from pulse_ray.schema import History
from pulse_ray.selection import selectors
from pulse_ray.selection.selectors import Choice
from pulse_ray.serving.store import Found, StoredReason, StoredThought
from pulse_ray.text import behaviour_text
from pulse_ray.thought_space.encoders import Encoders
from pulse_ray.tree.growing import TreeWriter, grow_tree
from pulse_ray.tree.search import Node


class Reasoning:
    """Grows trees and selects as the run did, without the similar users' items, which only the run knows.

    Args:
        writer: the language model.
        encoders: of the run's Thought Space; None where the variant selects by something else.
        selector: base, log_likelihood or thought_space.
        version: what its reasons are labelled with.
    """

    def __init__(
        self,
        config: Config,
        writer: TreeWriter,
        items: Catalogue,
        encoders: Encoders | None,
        *,
        selector: str,
        version: str,
    ) -> None:
        self.config, self.writer, self.items, self.encoders = config, writer, items, encoders
        self.selector, self.version = selector, version
        self.names = names.of_catalogue(items, config.tree.sampling)

    async def reason(self, history: History) -> Found | str:
        """A reason, or in a few words why there is none."""
        items, seed = self.items[history.domain], self.config.seed
        known = self.names.get(history.domain)
        nodes = await grow_tree(self.writer, self.config.tree, history, items, (), names=known, seed=seed)
        if isinstance(nodes, Flaw):
            return f"the tree was rejected: {nodes.reason}"
        # Encoding takes a core; the event loop must go on reading what the engine writes.
        choice = await asyncio.to_thread(self._choose, nodes, history)
        return Found(
            reason=StoredReason(
                text=choice.thought.text,
                agreement=choice.agreement,
                selector=self.selector,
                node_id=choice.thought.node_id,
                version=self.version,
            ),
            tree=tuple(StoredThought(**_fields(node)) for node in nodes),
        )

    def _choose(self, nodes: Sequence[Node], history: History) -> Choice:
        tree = [selectors.Thought(**_fields(node)) for node in nodes]
        if self.selector == "thought_space":
            assert self.encoders is not None, "the Thought Space selects with its encoders"
            settings = self.config.thought_space.text
            behaviour = behaviour_text(
                history,
                self.items[history.domain],
                None,
                count=self.encoders.counter("history"),
                max_tokens=settings.history_tokens,
                review_words=settings.review_words,
            )
            return selectors.thought_space([tree], [behaviour], self.encoders)[0]
        return (selectors.log_likelihood if self.selector == "log_likelihood" else selectors.base)([tree])[0]


def _fields(node: Node) -> dict[str, Any]:
    """What the store and the selectors both keep of a node."""
    thought = node.thought
    return {"node_id": node.node_id, "depth": node.depth, "text": thought.text, "mean_logprob": thought.mean_logprob}
