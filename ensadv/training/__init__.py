"""The training step, and the loop that makes it."""

__all__ = ['costs', 'from_config', 'objectives', 'step', 'train']
