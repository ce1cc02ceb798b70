"""Which snapshots have something left to do, and which are kept: decided from what eval/ holds."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ensadv.attacks import registry
from ensadv.evaluation.result_files import NOTHING, Evaluated, Unit
from ensadv.storage import selection


class View(NamedTuple):
    """A run as it was at one moment, and what is asked of it.

    Attributes:
      config: the run's own, which may ask for other attacks than `units`.
      evaluated: by step what eval/ holds.
      units: attacks on every snapshot.
      final_units: what follows on the best and the last snapshot.
      last_step: the last that training makes.
      only_on_last: whether `final_units` follow on the last snapshot alone.
    """

    config: Mapping[str, Any]
    evaluated: Mapping[int, Evaluated]
    units: Sequence[Unit]
    final_units: Sequence[Unit]
    last_step: int
    only_on_last: bool = False

    def missing(self, step: int, units: Iterable[Unit]) -> list[Unit]:
        """Returns which of these units a step lacks."""
        return self.evaluated.get(step, NOTHING).missing(units)

    @property
    def has_last(self) -> bool:
        """Whether the snapshot of the run's last step has all attacks but the final ones."""
        return not self.missing(self.last_step, self.units)

    def pending(self, steps: Iterable[int]) -> tuple[list[int], bool]:
        """Returns which snapshots have something to do, and whether that is the final units."""
        pending = [step for step in steps if self.missing(step, self.units)]
        if pending or not self.has_last:
            return pending, False
        kept = {self.last_step} if self.only_on_last else self.worth_keeping
        return [s for s in steps if s in kept and self.missing(s, self.final_units)], True

    @property
    def worth_keeping(self) -> set[int]:
        """The best and the last of the steps that have all units.

        What lacks some is no rival: another process may be at it.
        """
        results = {
            step: found.results
            for step, found in self.evaluated.items()
            if not found.missing(self.units)
        }
        # As `selection` has them from the files.
        evaluations = {
            step: {
                key: [result for unit, result in found.items() if unit.split == split]
                for key, split in (('attacks', 'test'), ('validation', 'validation'))
            }
            for step, found in results.items()
        }
        attack = selection.selection_attack(self._names)
        best = selection.best_step(evaluations, attack, self.config)
        return {step for step in (best, max(results, default=None)) if step is not None}

    def is_done(self, step: int) -> bool:
        """Returns whether nobody needs a snapshot for an attack on every snapshot any more.

        The run's own have to be there with the run's own settings.
        """
        own = [(name, 'test') for name in self._names]
        if self.config['eval']['select_on'] == 'validation':
            own.append((selection.selection_attack(self._names), 'validation'))
        there = {
            (unit.name, unit.split)
            for unit, result in self.evaluated.get(step, NOTHING).results.items()
            if selection.is_configured(unit.name, result['settings'], self.config)
        }
        return not self.missing(step, self.units) and there.issuperset(own)

    @property
    def _names(self) -> tuple[str, ...]:
        """The attacks that the run itself asks for."""
        return registry.names(self.config['eval'])
