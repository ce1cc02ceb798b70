"""From results to statistics, tables, figures and one page; without JAX and without weights."""

__all__ = [
    'audit_page', 'basis', 'collect', 'comparable', 'comparison', 'members', 'plane_figures', 'run',
    'sections', 'tables', 'write',
]  # fmt: skip
