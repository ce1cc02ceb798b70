"""Which snapshot of a run is its best, and by which attack: no JAX."""

from collections.abc import Mapping, Sequence
from typing import Any

from ensadv.config import WITHOUT_STEPS, parse_attack


def best_step(
    evaluations: Mapping[int, Mapping[str, Any]], attack: str, select_on: str = 'test'
) -> int | None:
    """Returns the step with the best accuracy under an attack; the earliest of equals.

    Args:
      evaluations: the content of eval/<step>.json by step.
      attack: its name.
      select_on: the split whose accuracy decides: 'test' or 'validation'.

    Returns:
      The step, or None where that was never evaluated.
    """
    key = 'validation' if select_on == 'validation' else 'attacks'
    accuracies = {
        step: result['accuracy']
        for step in sorted(evaluations)
        for result in evaluations[step][key]
        if result['name'] == attack
    }
    return max(accuracies, key=accuracies.get, default=None)


def selection_attack(names: Sequence[str]) -> str:
    """Returns which of a config's attacks decides which snapshot is the best.

    IFGSM5, as in the paper; where it is not there the first attack that is, or clean. blackbox can
    be made on the test split alone, and decides only where nothing else is there.
    """
    if 'ifgsm5' in names:
        return 'ifgsm5'
    attacked = [name for name in names if name not in WITHOUT_STEPS]
    return (attacked or [name for name in names if name != 'blackbox'] or list(names))[0]


def strongest(names: Sequence[str]) -> str | None:
    """Returns the attack with the most gradient steps, PGD of equals; None if none has any."""
    attacked = [name for name in names if name not in WITHOUT_STEPS]

    def strength(name: str) -> tuple[int, bool]:
        kind, steps = parse_attack(name)
        return steps, kind == 'pgd'

    return max(attacked, key=strength, default=None)
