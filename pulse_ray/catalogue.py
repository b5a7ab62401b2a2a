"""The items of every domain by id, as models see them: small enough to be held by each actor that writes prompts."""

from __future__ import annotations

from collections.abc import Container, Mapping

from pulse_ray.schema import Item
from pulse_ray.workspace import Artefact

Catalogue = Mapping[str, Mapping[str, Item]]
"""`catalogue[domain][item_id]`."""


def load(artefact: Artefact, wanted: Container[tuple[str, str]] | None = None) -> Catalogue:
    """Reads the `items` artefact, one part after another.

    Args:
        wanted: domain and id of the items to keep; unset keeps all.

    Raises:
        ArtifactError: a part is damaged.
    """
    found: dict[str, dict[str, Item]] = {}
    for data in artefact.tables():
        for row in data.to_pylist():
            domain = row.pop("domain")
            row["categories"] = tuple(row["categories"])
            if wanted is None or (domain, row["item_id"]) in wanted:
                found.setdefault(domain, {})[row["item_id"]] = Item(**row)
    return found
