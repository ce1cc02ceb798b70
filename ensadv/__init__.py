"""Adversarially trained ensembles in JAX: train them as one model, judge them honestly.

`ensadv.evaluate` attacks any model of yours, see docs/any_model.md.
"""

import importlib
from typing import Any

__version__ = '0.1.0'

# Imported, with JAX, when they are asked for.
_OFFERED = {
    'evaluate': 'ensadv.evaluation.any_model',
    'Evaluation': 'ensadv.evaluation.any_model',
    'ThreatModel': 'ensadv.attacks.threat_model',
}
__all__ = list(_OFFERED)


def __getattr__(name: str) -> Any:
    if name not in _OFFERED:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(_OFFERED[name]), name)
