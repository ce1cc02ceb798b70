"""Networks, and k of them as one. Pure functions."""

__all__ = ['base', 'ensemble', 'gated', 'norm', 'vgg', 'wide_resnet']
