"""The training step, and the loop that makes it."""

__all__ = [
    'costs',
    'from_config',
    'nans',
    'objectives',
    'optim',
    'pace',
    'step',
    'streams',
    'train',
]
