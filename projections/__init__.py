"""Projections: how a gradient matrix is compressed before an optimizer keeps statistics of it.

A projection is a frozen set of hyperparameters. What it learns from a gradient is one tensor, kept in the optimizer's
state under `Projection.key`: an orthonormal basis or a list of indices.
"""

if __name__ != "slimstate.projections":
    raise ImportError(
        f"this folder is the package slimstate.projections, not {__name__!r}: install it (pip install -e .) "
        "and import slimstate.projections"
    )

from ._base import DenseProjection, Projection
from ._matrix import MatrixView, matrix_view
from .coordinates import Coordinates
from .dct import DCT
from .hadamard import Hadamard
from .measures import captured_energy, subspace_overlap
from .random import RandomOrthogonal
from .svd import SVD, PowerIteration

__all__ = [
    "DCT",
    "SVD",
    "Coordinates",
    "DenseProjection",
    "Hadamard",
    "MatrixView",
    "PowerIteration",
    "Projection",
    "RandomOrthogonal",
    "captured_energy",
    "matrix_view",
    "subspace_overlap",
]
