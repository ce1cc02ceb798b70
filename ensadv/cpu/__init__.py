"""What is there only because XLA's CPU backend is slow."""

__all__ = ['backend', 'conv', 'means', 'onednn', 'order', 'parts', 'processor']
