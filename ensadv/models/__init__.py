"""Networks, and k of them as one. Pure functions."""

__all__ = [
    'base', 'conv', 'ensemble', 'features', 'functions', 'gated', 'norm', 'own_networks', 'vgg',
    'wide_resnet',
]  # fmt: skip
