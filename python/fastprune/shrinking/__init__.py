"""Physical removal: what masks took whole is cut out, and dense layers get smaller."""

from .removable import Removable, removable_layers
from .removal import shrink
from .saving import PARTS, shaped_like_saved, shrunk_structure

__all__ = ["PARTS", "Removable", "removable_layers", "shaped_like_saved", "shrink", "shrunk_structure"]
