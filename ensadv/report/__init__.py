"""From results to statistics, tables, figures and one page; without JAX and without weights."""

__all__ = [
    'analysis',
    'basis',
    'collect',
    'comparable',
    'computation',
    'drawing',
    'figures',
    'findings',
    'page',
    'paper',
    'pictures',
    'run',
    'sections',
    'significance',
    'table1',
    'tables',
    'worst_case',
    'write',
]
