"""Devices, processes, signals and logs."""

__all__ = [
    'compilation_cache',
    'distributed',
    'progress',
    'stopping',
    'switches',
    'terminal',
    'tf_import',
]
