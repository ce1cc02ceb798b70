"""Devices, processes, signals and logs."""

__all__ = [
    'compilation_cache',
    'distributed',
    'peers',
    'progress',
    'stopping',
    'switches',
    'terminal',
    'tf_import',
]
