"""Robustness and computation: what systems cost, and which are on the Pareto front."""

import itertools
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ensadv.report import analysis
from ensadv.report.run import Run
from ensadv.report.table1 import MISSING, attack_name
from ensadv.report.tables import Row, Table

Accuracy = tuple[float, float, float]  # mean, low and high, in 0..1


class Costs(NamedTuple):
    """What a system costs; None where it is not known."""

    parameters: float | None  # of all members
    forward: float | None  # operations per prediction
    training: float | None  # operations of the whole training
    seconds: float | None  # per training step, measured
    machine: str  # on which


def of_system(runs: Sequence[Run]) -> Costs:
    """Returns what a system costs, by its runs: of the measured times the median."""
    first = runs[0]
    if first.model:
        return Costs(None, None, None, None, '')
    # Of a run, or of each member of an ensemble of runs.
    trained = [(m.get('operations'), m['config'], m['step']) for m in first.members] or [
        (first.record.get('operations'), first.config, first.steps)
    ]
    forward = training = None
    if all(operations is not None for operations, _, _ in trained):
        forward = sum(operations['forward'] for operations, _, _ in trained)
        training = sum(
            operations['train_step'] * config['train']['batch_size'] * steps
            for operations, config, steps in trained
        )
    if not first.is_trained_here:
        training = None
    timed = [timing for run in runs if (timing := _timing(run))]
    machines = sorted({machine for _, machine in timed})
    # Times of different machines are not to be averaged.
    seconds = statistics.median(time for time, _ in timed) if len(machines) == 1 else None
    return Costs(first.record['parameters'], forward, training, seconds, ' and '.join(machines))


def _timing(run: Run) -> tuple[float, str] | None:
    """Returns the seconds per step of the run's last timed session, and the machine."""
    for session in reversed([] if run.members else run.record['sessions']):
        if 'seconds_per_step' in session:
            devices = session['devices']
            machine = f'{devices["count"]} x {devices["kind"]}'
            return session['seconds_per_step'], f'{machine}, {run.config["model"]["dtype"]}'
    return None


# The fields of `Costs` that robustness is set against: a short name, and an axis's.
_MEASURES = {
    'parameters': ('parameters', 'parameters'),
    'forward': ('prediction', 'operations per prediction'),
    'training': ('training', 'operations of training'),
    'seconds': ('seconds', 'seconds per training step'),
}
_SUPERSCRIPTS = str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹')
_WORDS = {3: 'thousands', 6: 'millions', 9: 'billions'}
CSV_HEADER = (
    'system', 'parameters', 'operations_per_prediction', 'operations_of_training',
    'seconds_per_step', 'machine', 'attack', 'accuracy', 'low', 'high', 'on_front_of',
)  # fmt: skip


class Panel(NamedTuple):
    """One measure of cost, by its short name, and a panel of its figure.

    The label has the unit of the costs, as in 'parameters (millions)'. Systems of which the cost
    is not known are missing. On the front: with this cost and robust accuracy.
    """

    measure: str
    label: str
    cost: Mapping[str, float]
    front: Collection[str]


def panels(costs: Mapping[str, Costs], accuracy: Mapping[str, Accuracy]) -> list[Panel]:
    """Returns the measures that are known of two systems or more, all by system."""
    machines = {cost.machine for cost in costs.values() if cost.seconds is not None}
    found = []
    for field, (measure, label) in _MEASURES.items():
        if field == 'seconds' and len(machines) != 1:
            continue  # times of different machines do not compare
        known = {system: getattr(cost, field) for system, cost in costs.items()}
        known = {system: value for system, value in known.items() if value is not None}
        if len(known) < 2:
            continue
        exponent = 0
        if field == 'seconds':
            label = f'{label} ({machines.pop()})'
        elif exponent := _exponent(max(known.values())):
            power = f'10{str(exponent).translate(_SUPERSCRIPTS)}'
            label = f'{label} ({_WORDS.get(exponent, power) if field == "parameters" else power})'
        known = {system: cost / 10**exponent for system, cost in known.items()}
        means = [accuracy[system][0] for system in known]
        front = analysis.pareto_front(np.array(list(known.values())), np.array(means))
        found.append(Panel(measure, label, known, list(itertools.compress(known, front))))
    return found


def table(
    costs: Mapping[str, Costs],
    accuracy: Mapping[str, Accuracy],
    attack: str,
    found: Sequence[Panel],
    n: int,
) -> Table:
    """Returns robust accuracy on n examples beside what each system costs, and its fronts."""
    rows = []
    for system, cost in costs.items():
        mean, low, high = (100 * value for value in accuracy[system])
        cells = (
            system,
            MISSING if cost.parameters is None else f'{cost.parameters:,.0f}',
            _count(cost.forward),
            _count(cost.training),
            MISSING if cost.seconds is None else f'{cost.seconds:.3g}',
            f'{mean:.1f} ({low:.1f} to {high:.1f})',
            _on_front(system, found),
        )
        rows.append(Row(cells))
    name = attack_name(attack)
    notes = [
        f'Accuracy under {name} (n = {n:,}) of the last snapshots in %, with its 95 % '
        'bootstrap interval. '
        'The columns per prediction and training count floating-point operations of all '
        'members: of one prediction, and of all training steps, attacks included. They are counted '
        'in the programs before optimization; a multiply-add counts as 2.',
        'On the Pareto front: no other system is at least as robust at no higher cost, and better '
        'in one of the two. Means are compared, whatever their intervals.',
    ]
    machines = {system: cost.machine for system, cost in costs.items() if cost.machine}
    if machines:
        on = dict.fromkeys(machines.values())
        if len(on) > 1:
            on = [f'{machine} ({system})' for system, machine in machines.items()]
        notes.append(
            'Seconds per training step: the median over the intervals between two log lines, '
            f'without compilation, on {"; ".join(on)}.'
        )
    header = (
        'system', 'parameters', 'per prediction', 'training', 's per step', name, 'on the front of'
    )  # fmt: skip
    title = 'Robustness and computation'
    return Table('computation', title, header, tuple(rows), tuple(notes))


def csv_rows(
    costs: Mapping[str, Costs],
    accuracy: Mapping[str, Accuracy],
    attack: str,
    found: Sequence[Panel],
) -> list[tuple[Any, ...]]:
    """Returns the numbers of the table, see `CSV_HEADER`; what is not known is None."""
    return [
        (system, *cost, attack, *accuracy[system], '; '.join(_fronts(system, found)))
        for system, cost in costs.items()
    ]


def _fronts(system: str, found: Sequence[Panel]) -> list[str]:
    """Returns the measures on whose front a system is."""
    return [panel.measure for panel in found if system in panel.front]


def _on_front(system: str, found: Sequence[Panel]) -> str:
    """Returns `_fronts` as a cell."""
    if found and not any(system in panel.cost for panel in found):
        return MISSING
    fronts = _fronts(system, found)
    return 'all' if len(found) == len(fronts) > 1 else ', '.join(fronts) or 'none'


def _exponent(value: float) -> int:
    """Returns the multiple of 3 by whose power of ten a value is shown."""
    return math.floor(math.log10(value)) // 3 * 3 if value > 0 else 0


def _count(operations: float | None) -> str:
    if operations is None or operations <= 0:
        return MISSING
    operations = float(f'{operations:.3g}')  # which may be the next power of ten
    exponent = _exponent(operations)
    return f'{operations / 10**exponent:.3g}e{exponent}'
