"""Facts about model families, one small file each, and the text towers that belong to them."""

from visiontrim.models.family import Family, family_of, list_families
from visiontrim.models.text import TextTower

__all__ = ["Family", "TextTower", "family_of", "list_families"]
