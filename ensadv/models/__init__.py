"""Networks, and k of them as one. Pure functions."""

__all__ = ['base', 'conv', 'ensemble', 'gated', 'norm', 'vgg', 'wide_resnet']
