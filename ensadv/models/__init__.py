"""Networks, and k of them as one. Pure functions."""

__all__ = ['base', 'conv', 'ensemble', 'functions', 'gated', 'norm', 'vgg', 'wide_resnet']
