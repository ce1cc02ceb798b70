"""Weights that leave as PyTorch's, and others' that become a run."""

__all__ = ['export', 'imports', 'naming']
