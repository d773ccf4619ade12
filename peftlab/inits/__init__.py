"""Initialisations: where an adapter starts from, for methods that begin elsewhere than at nothing."""

from .loftq import loftq

__all__ = ["loftq"]
