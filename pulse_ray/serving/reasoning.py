"""Reasons for histories that the store has none for: a tree grown on the spot, and its best leaf."""

from __future__ import annotations

from typing import Any

from pulse_ray.catalogue import Catalogue
from pulse_ray.config import BY_BEHAVIOUR, Config, Variant
from pulse_ray.generation import names
from pulse_ray.generation.gates import Flaw
from pulse_ray.schema import History
from pulse_ray.selection import selectors
from pulse_ray.selection.selectors import Choice
from pulse_ray.serving.store import Found, StoredReason, StoredThought
from pulse_ray.thought_space.agreement import Agreement
from pulse_ray.tree.growing import TreeWriter, grow_tree
from pulse_ray.tree.search import Node
from pulse_ray.workspace import Artefact


class Reasoning:
    """Grows trees and selects as the run did, without the similar users' items, which only the run knows.

    Args:
        writer: the language model.
        beam: compares what a beam has to choose from; None where trees grow without one.
        comparing: compares leaves for the selector; None where it selects by something else.
        selector: base, or one of select.selectors.
        version: what its reasons are labelled with.
    """

    def __init__(
        self,
        config: Config,
        writer: TreeWriter,
        items: Catalogue,
        *,
        beam: Agreement | None,
        comparing: Agreement | None,
        selector: str,
        version: str,
    ) -> None:
        self.config, self.writer, self.items = config, writer, items
        self.beam, self.comparing = beam, comparing
        self.selector, self.version = selector, version
        self.names = names.of_catalogue(items, config.tree.sampling)

    async def reason(self, history: History) -> Found | str:
        """A reason, or in a few words why there is none."""
        items, seed = self.items[history.domain], self.config.seed
        agree = self.beam.of(history) if self.beam else None
        known = self.names.get(history.domain)
        nodes = await grow_tree(self.writer, self.config.tree, history, items, (), names=known, seed=seed, agree=agree)
        if isinstance(nodes, Flaw):
            return f"the tree was rejected: {nodes.reason}"
        choice = await self._choose([selectors.Thought(**_fields(node)) for node in nodes], history)
        return Found(
            reason=StoredReason(
                text=choice.thought.text,
                agreement=choice.agreement,
                selector=self.selector,
                node_id=choice.thought.node_id,
                version=self.version,
            ),
            tree=tuple(StoredThought(**_fields(node), agreement=node.agreement) for node in nodes),
        )

    async def _choose(self, tree: selectors.Tree, history: History) -> Choice:
        if self.comparing is None:
            seed = selectors.draw_seed(self.config.seed, history.example_id)
            return selectors.WITHOUT_ENCODERS[self.selector](tree, seed)
        texts = [leaf.text for leaf in selectors.leaves(tree)]
        return selectors.best(tree, await self.comparing.of(history)(texts))


def load(config: Config, writer: TreeWriter, items: Catalogue, trained: Artefact) -> Reasoning:
    """What serves the configured variant.

    Args:
        trained: the run's encoders; read only where the selector or a beam needs them.
    """
    selector, has_beam = config.ranker.served(config.serve.variant), config.tree.beam_width is not None
    needed: set[Variant] = {selector} & BY_BEHAVIOUR
    needed |= {"thought_space"} if has_beam else set()
    agreements = {
        name: Agreement(selectors.load_encoders(name, config, lambda: trained), items, config.thought_space.text)
        for name in needed
    }
    return Reasoning(
        config,
        writer,
        items,
        beam=agreements["thought_space"] if has_beam else None,
        comparing=agreements.get(selector),
        selector=selector,
        version=f"{selector}@online",
    )


def _fields(node: Node) -> dict[str, Any]:
    """What the store and the selectors both keep of a node."""
    return {
        "node_id": node.node_id,
        "depth": node.depth,
        "leaf": node.leaf,
        "text": node.thought.text,
        "mean_logprob": node.thought.mean_logprob,
    }
