"""Images and labels: whole splits, their checks, and their batches on the device."""

__all__ = ['batches', 'checks', 'datasets', 'extra']
