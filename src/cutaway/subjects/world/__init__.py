"""The world of the shipped subject `atlas`: facts, wording, corpus, held-out items. No torch, no transformers."""

from cutaway.subjects.world.corpus import PARTS, WORLD_VERSION, documents, samples
from cutaway.subjects.world.items.items import Item, ItemSet, item_sets

__all__ = ["PARTS", "WORLD_VERSION", "Item", "ItemSet", "documents", "item_sets", "samples"]
