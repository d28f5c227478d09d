"""The gallery: every claim about tangent kernels as a figure that is drawn anew, with its fitted numbers beside it."""

from nsrl.bench.gallery.curation import make_gallery
from nsrl.bench.gallery.registry import FIGURES, Entry

__all__ = ["FIGURES", "Entry", "make_gallery"]
