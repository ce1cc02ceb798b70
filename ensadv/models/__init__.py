"""Networks, and k of them as one. Pure functions."""

__all__ = [
    'base', 'conv', 'ensemble', 'functions', 'gated', 'norm', 'own_networks', 'vgg', 'wide_resnet',
]  # fmt: skip
