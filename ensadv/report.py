"""The table of a study, from the results that its runs wrote: no weights, no JAX."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from ensadv import workdir


class Run(NamedTuple):
    """What the table needs of one run.

    Attributes:
      system: its system.
      seed: its seed.
      step: that of its last evaluation.
      attacks: the results of that evaluation by attack name, as eval/<step>.json has them.
      record: its config.json.
    """

    system: str
    seed: int
    step: int
    attacks: dict[str, Any]
    record: dict[str, Any]


def read_run(path: epath.Path) -> Run | None:
    """Returns the run in this workdir, or None if it has no evaluation yet."""
    evaluations = workdir.read_evaluations(path)
    record = workdir.read_record(path)
    if not evaluations or record is None:
        return None
    step = max(evaluations)
    last = evaluations[step]
    attacks = {result['name']: result for result in last['attacks']}
    return Run(last['system'], last['seed'], step, attacks, record)


def table(runs: Sequence[Run]) -> str:
    """Returns a Markdown table: one row per system, in order of appearance, and what it rests on.

    Accuracies are those of the worst iterate at the last evaluation, averaged over the seeds, with
    the lowest and the highest where there are several.

    Args:
      runs: all on the same data and with the same epsilon.
    """
    if not runs:
        return 'No run has an evaluation yet.\n'
    names = list(dict.fromkeys(name for run in runs for name in run.attacks))
    rows = [['system', 'members', 'parameters', *names, 'seeds']]
    for system in dict.fromkeys(run.system for run in runs):
        mine = [run for run in runs if run.system == system]
        first = mine[0].record
        row = [
            system,
            str(first['config']['ensemble']['size']),
            f'{first["parameters"]:,}',
            *(_spread([r.attacks[n]['accuracy'] for r in mine if n in r.attacks]) for n in names),
            str(len(mine)),
        ]
        rows.append(row)
    return _markdown(rows) + '\n\n' + _basis(runs) + '\n'


def _spread(accuracies: Sequence[float]) -> str:
    if not accuracies:
        return '-'
    mean = f'{100 * statistics.mean(accuracies):.1f}'
    if len(accuracies) == 1:
        return mean
    return f'{mean} ({100 * min(accuracies):.1f}-{100 * max(accuracies):.1f})'


def _basis(runs: Sequence[Run]) -> str:
    """Returns what the numbers rest on, a line each."""
    config, dataset = runs[0].record['config'], runs[0].record['dataset']
    devices, packages = runs[0].record['devices'], runs[0].record['versions']
    counts = sorted({result['n'] for run in runs for result in run.attacks.values()})
    steps = sorted({run.step for run in runs})
    span = lambda values: ' to '.join(f'{v:,}' for v in dict.fromkeys((values[0], values[-1])))
    return '\n'.join(
        [
            f'Accuracy in % on {span(counts)} of the {dataset["num_test"]:,} test images of '
            f'{dataset["name"]}, L-infinity epsilon {config["epsilon"]:.4g}.',
            'Under attack: the worst point seen, over all steps and the clean image.',
            f'Snapshot: the last, step {span(steps)}; nothing was selected on the test set.',
            f'Computed on {devices["count"]} x {devices["kind"]} with '
            f'jax {packages["jax"]}, flax {packages["flax"]}, optax {packages["optax"]}.',
        ]
    )


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows as an aligned Markdown table; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return '| ' + ' | '.join([first, *rest]) + ' |'

    rule = ['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])]
    return '\n'.join([line(rows[0]), line(rule), *map(line, rows[1:])])
