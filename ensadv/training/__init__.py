"""The training step, and the loop that makes it."""

__all__ = ['costs', 'from_config', 'nans', 'optim', 'pace', 'steps', 'streams', 'train']
