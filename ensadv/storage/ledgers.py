"""What a step's ledger says of several attacks together: arrays in, arrays out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ensadv.attacks import registry
from ensadv.storage import selection

Ledger = Mapping[str, np.ndarray]


def stands(ledger: Ledger, keys: Sequence[str]) -> np.ndarray:
    """Returns which examples none of these attacks fooled, bool [n].

    An attack may have been made on the first few examples only: n is how many all of them have.
    """
    margins = [ledger[f'{key}_margin'] for key in keys]
    n = min(map(len, margins))
    return np.all([margin[:n] > 0 for margin in margins], axis=0)


def correct(ledger: Ledger, keys: Sequence[str], attacks: Sequence[str]) -> np.ndarray:
    """Returns which examples count as correct under all of these together, bool [n].

    Those that nothing fooled, and that some attack really attacked: it found a gradient.

    Args:
      ledger: of a step.
      keys: what the names of the arrays begin with.
      attacks: those of `keys` that may have attacked an example.
    """
    standing = stands(ledger, keys)
    attacked = [ledger[f'{key}_correct'][: len(standing)] for key in attacks]
    return standing & np.any(attacked, axis=0)


def robust_examples(results: Sequence[Mapping[str, Any]], ledger: Ledger) -> np.ndarray | None:
    """Returns which examples count for robust accuracy over results of the test split, bool [n].

    An example counts only if it stands under every one of them, clean and blackbox included. These
    two look for no gradient: where there are other attacks, one of those has to have attacked it.

    Args:
      results: of a step.
      ledger: the step's.

    Returns:
      Of the examples that all results are of. None if no result is an attack's, or the ledger lacks
      one.
    """
    keys = {selection.ledger_key(result): result['name'] for result in results}
    attacks = [key for key, name in keys.items() if name not in registry.WITHOUT_SETTINGS]
    attacks = attacks or [key for key, name in keys.items() if name != 'clean']
    if not attacks or any(f'{key}_{of}' not in ledger for key in keys for of in _READ):
        return None
    return correct(ledger, list(keys), attacks)


def robust(results: Sequence[Mapping[str, Any]], ledger: Ledger) -> dict[str, Any] | None:
    """Returns the accuracy of `robust_examples`, as eval/<step>.json has it; None where that is.

    Returns:
      accuracy, correct, no_gradient, n, and the keys of the results as attacks.
    """
    right = robust_examples(results, ledger)
    if right is None:
        return None
    keys = list(map(selection.ledger_key, results))
    return {
        'n': len(right),
        'correct': int(np.sum(right)),
        'accuracy': float(np.mean(right)),
        'no_gradient': int(np.sum(stands(ledger, keys) & ~right)),
        'attacks': keys,
    }


_READ = ('correct', 'margin')
