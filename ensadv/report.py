"""The table of a study, from the results that its runs wrote: no weights, no JAX."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from ensadv import analysis, workdir


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
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


def write_table(root: epath.Path, runs: Sequence[epath.Path]) -> None:
    """Prints the table of these runs' workdirs, and writes it to root/table.md."""
    text = table([run for path in runs if (run := read_run(path)) is not None])
    workdir.write_bytes(root / 'table.md', text.encode())
    print(f'\n{text}\nWritten to {root / "table.md"}')


def table(runs: Sequence[Run]) -> str:
    """Returns a Markdown table: one row per system, in order of appearance, and what it rests on.

    Accuracies are those of the worst iterate at the last evaluation, averaged over the seeds, with
    the lowest and the highest where there are several. Runs that cannot be compared with the first
    are named below the table and not in it.

    Args:
      runs: any number.
    """
    if not runs:
        return 'No run has an evaluation yet.\n'
    reasons = {run: _difference(runs[0], run) for run in runs}
    apart = [
        f'Not in the table: {run.system}, seed {run.seed}: {reason}.'
        for run, reason in reasons.items()
        if reason
    ]
    runs = [run for run, reason in reasons.items() if not reason]
    names = list(dict.fromkeys(name for run in runs for name in run.attacks))
    rows = [['system', 'members', 'parameters', *names, 'seeds']]
    for system in dict.fromkeys(run.system for run in runs):
        mine = [run for run in runs if run.system == system]
        first = mine[0].record
        row = [
            system,
            str(first['config']['ensemble']['size']),
            f'{first["parameters"]:,}',
            *(_cell([r.attacks[n] for r in mine if n in r.attacks]) for n in names),
            str(len(mine)),
        ]
        rows.append(row)
    return '\n'.join([analysis.markdown(rows), '', *_basis(runs), *apart, ''])


def _difference(first: Run, run: Run) -> str:
    """Returns why two runs' numbers cannot stand in one table; '' if they can."""
    if run.record['dataset']['fingerprint'] != first.record['dataset']['fingerprint']:
        return f'its data are others ({run.record["dataset"]["name"]})'
    trained_on, expected = (r.record['dataset']['num_train'] for r in (run, first))
    if trained_on != expected:
        return f'trained on {trained_on:,} examples, not {expected:,}'
    for name, result in run.attacks.items():
        expected = first.attacks.get(name)
        if expected is None:
            continue
        if result['n'] != expected['n']:
            return f'{name} on {result["n"]:,} examples, not {expected["n"]:,}'
        for setting, value in expected['settings'].items():
            # How a system combines its members is a part of it.
            if setting != 'combine' and result['settings'].get(setting) != value:
                return f'{name} with {setting} {result["settings"].get(setting)}, not {value}'
    return ''


def _cell(results: Sequence[Mapping[str, Any]]) -> str:
    """Returns the mean over the seeds and its spread; * where an attack had no gradient."""
    if not results:
        return '-'
    accuracies = [100 * result['accuracy'] for result in results]
    mark = '*' if any(result.get('no_gradient') for result in results) else ''
    mean = f'{statistics.mean(accuracies):.1f}{mark}'
    return mean if len(results) == 1 else f'{mean} ({min(accuracies):.1f}-{max(accuracies):.1f})'


def _basis(runs: Sequence[Run]) -> list[str]:
    """Returns what the numbers rest on, a line each."""
    dataset, attacks = runs[0].record['dataset'], runs[0].attacks
    n = next(iter(attacks.values()))['n']
    steps = sorted({run.step for run in runs})
    span = f'{steps[0]:,}' if len(steps) == 1 else f'{steps[0]:,} to {steps[-1]:,}'
    settings = [
        f'{name}: ' + ', '.join(f'{k} {v}' for k, v in result['settings'].items() if k in _SHOWN)
        for name, result in attacks.items()
        if name != 'clean'
    ]
    without = sum(r.get('no_gradient', 0) for run in runs for r in run.attacks.values())
    if without:
        settings.append(
            f'* {without:,} examples stood without having been attacked, their gradients being '
            'zero or NaN; they are not counted as correct.'
        )
    trained = [session for run in runs for session in run.record['sessions']]
    evaluated = [result for run in runs for result in run.attacks.values()]
    return [
        f'Accuracy in % on {n:,} of the {dataset["num_test"]:,} test images of {dataset["name"]}; '
        'under white-box attacks at the worst point over all steps, the clean image among them.',
        f'Snapshot: the last, step {span}; nothing was selected on the test set.',
        *settings,
        f'Trained on {_machines(trained)}; evaluated on {_machines(evaluated)}.',
    ]


_SHOWN = ('epsilon', 'step_size', 'schedule', 'start', 'restarts', 'loss', 'digest', 'share_fooled')


def _machines(sessions: Sequence[Mapping[str, Any]]) -> str:
    """Returns the devices and versions of sessions, each once."""
    return ' and '.join(
        dict.fromkeys(
            f'{s["devices"]["count"]} x {s["devices"]["kind"]} with jax {s["versions"]["jax"]}, '
            f'ensadv {s["versions"]["ensadv"]}'
            for s in sessions
        )
    )
