"""The training step, and the loop that makes it."""

__all__ = ['costs', 'diversity', 'feeds', 'from_config', 'objectives', 'step', 'streams', 'train']
