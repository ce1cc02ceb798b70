"""Adversarially trained ensembles in JAX: train them as one model, judge them honestly."""
