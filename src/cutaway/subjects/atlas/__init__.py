"""Atlas: a small trained model whose world we know."""

from cutaway.subjects.atlas.shipped import atlas_folder

__all__ = ["atlas_folder"]
