"""What is there only because XLA's CPU backend is slow."""

__all__ = ['conv', 'gradients', 'onednn', 'parts', 'processor', 'winograd']
