"""Adversarially trained ensembles in JAX: train them as one model, judge them honestly."""

__version__ = '0.1.0'
