"""From results to statistics, tables, figures and one page; without JAX and without weights."""

__all__ = ['audit_page', 'comparison', 'members', 'plane_figures', 'sections', 'write']
