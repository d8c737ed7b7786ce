"""Weights of low precision: how they are read into arithmetic, and written back."""

from slimstate.ops.weights import LOW_PRECISION, NEAREST, Rounding, narrow_, widen

__all__ = ["LOW_PRECISION", "NEAREST", "Rounding", "narrow_", "widen"]
