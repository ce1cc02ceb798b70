"""The runs below a directory, and which of them may stand in one table."""

import collections
import concurrent.futures
import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from ensadv.errors import UserError
from ensadv.report import comparable, worst_case
from ensadv.report.run import Run, by_name, find, name_of, read
from ensadv.storage import files, selection, workdir


@dataclasses.dataclass(frozen=True, eq=False)
class Collection:
    """Runs whose numbers can stand side by side, and those whose cannot.

    The runs are ordered by system and seed, the systems as in the paper, then by name. Of every
    other run `apart` has its name and the reason.
    """

    runs: Sequence[Run]
    apart: Sequence[tuple[str, str]]

    @property
    def notes(self) -> list[str]:
        """What readers should know of the runs, a sentence each."""
        return comparable.notes_on(self.runs, self.over_training)

    @property
    def systems(self) -> dict[str, list[Run]]:
        """The runs by system."""
        by_system = collections.defaultdict(list)
        for run in self.runs:
            by_system[run.system].append(run)
        return dict(by_system)

    @property
    def attacks(self) -> list[str]:
        """The labels of all attacks at the last steps, in the runs' order.

        Long ones come last, and of these the ones in stages.
        """
        found = {k: r for run in self.runs for k, r in run.attacks(run.steps).items()}
        names = [result['name'] for result in sorted(found.values(), key=_place)]
        wanted = [name for run in self.runs for name in run.wanted]
        names = list(dict.fromkeys([*(name for name in wanted if name in names), *names]))
        # The worst case of a name comes last.
        order = dict.fromkeys(label for run in self.runs for label in run.labels.values())
        labels = [label for label in order | found if label in found]
        return sorted(labels, key=lambda label: names.index(name_of(label)))

    @property
    def over_training(self) -> list[str]:
        """Of `attacks`, those that have a label of their name with the most evaluations.

        What was evaluated later, when only the best and the last snapshot were there, has few:
        their mean would be one of selected snapshots.
        """
        counts = {
            label: sum(label in run.attacks(step) for run in self.runs for step in run.evaluations)
            for label in self.attacks
        }
        groups = by_name(counts).values()
        return [a for mine in groups for a in mine if counts[a] == max(map(counts.get, mine))]

    def of_all(self, attacks: Sequence[str]) -> list[str]:
        """Returns those attacks that every run's last step has."""
        return [a for a in attacks if all(a in run.attacks(run.steps) for run in self.runs)]


def collect(root: epath.Path, order: Sequence[str]) -> Collection:
    """Reads the runs below a directory, or the one in it; raises UserError if none is there.

    Systems are in the given order; others follow by name.
    """
    paths = list(find(root))
    if not paths:
        nothing = (
            'found no run below it (no config.json)' if root.is_dir() else workdir.no_run(root)
        )
        raise UserError(f'--workdir={root}: {nothing}')
    sources = _sources(paths)
    names = [path.relative_to(root).as_posix() if path != root else path.name for path in paths]
    runs, apart = [], []
    # Of many small files, on storage that may be far away.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = list(pool.map(_read, paths, names))
    for path, name, run in zip(paths, names, found, strict=True):
        reason = run if isinstance(run, str) else sources.get(path) or _unfinished(run)
        apart += [(name, reason)] if reason else []
        runs += [] if reason else [run]
    runs.sort(key=lambda run: _rank(run, order))
    for rule in (
        comparable.other_threat_model,
        comparable.other_attacks,
        comparable.other_system,
        comparable.twice,
    ):
        reasons = rule(runs)
        apart += [(run.name, reasons[run]) for run in runs if run in reasons]
        runs = [run for run in runs if run not in reasons]
    labels = comparable.labels(runs)
    runs = worst_case.add([dataclasses.replace(run, labels=labels) for run in runs])
    return Collection(runs, sorted(apart))


def strongest(attacks: Sequence[str], runs: Sequence[Run]) -> str | None:
    """Returns the strongest by `selection.strongest`; of those of one name which fools the most.

    That is the worst case, where there is one. Else it is by the mean over the runs that have it at
    their last step. An example without a gradient is not fooled, and so makes no attack a strong
    one.
    """

    def standing(label: str) -> tuple[float, bool]:
        found = [run.attacks(run.steps) for run in runs]
        results = [results[label] for results in found if label in results]
        unfooled = statistics.mean((r['correct'] + r['no_gradient']) / r['n'] for r in results)
        return unfooled, not worst_case.is_worst(label)

    name = selection.strongest(list(map(name_of, attacks)))
    return min((a for a in attacks if name_of(a) == name), key=standing, default=None)


def _place(result: Mapping[str, Any]) -> int:
    return 2 if 'stages' in result else int('curve' in result)


def _read(path: epath.Path, name: str) -> Run | str:
    """Reads a run; returns the reason where that is not possible."""
    try:
        return read(path, name)
    except UserError as error:
        return str(error)


def _rank(run: Run, order: Sequence[str]) -> tuple[Any, ...]:
    known = order.index(run.system) if run.system in order else len(order)
    return known, run.system, [int(part) for part in run.seed.split('+')], run.name


def _sources(paths: Sequence[epath.Path]) -> dict[epath.Path, str]:
    """Returns the runs that the transfer sets beside them were made to fool, and says so."""
    reasons = {}
    for folder in dict.fromkeys(path.parent for path in paths):
        file = folder / 'blackbox.npz'
        if not file.exists():
            continue
        try:
            record = json.loads(str(files.read_arrays(file)['record']))
            # The directory may have moved since.
            found = {folder / epath.Path(source['workdir']).name for source in record['sources']}
            reason = 'a source of the transfer set'
        except Exception:  # whatever storage, zipfile, NumPy and JSON raise
            found = {path for path in paths if path.parent == folder}
            reason = f'perhaps a source of the transfer set beside it ({file.name} is damaged)'
        reasons |= dict.fromkeys(found, reason)
    return reasons


def _unfinished(run: Run) -> str:
    """Returns what a run lacks; '' if nothing."""
    if run.steps not in run.evaluations:
        reached = max(run.evaluations, default=None)
        done = 'not evaluated yet' if reached is None else f'evaluated up to step {reached:,}'
        return f'unfinished: {done}, of {run.steps:,} steps'
    there = [result['name'] for result in run.results(run.steps)]
    missing = [name for name in run.wanted if name not in there]
    judges = [result['name'] for result in run.evaluations[run.steps]['validation']]
    if run.config['eval']['select_on'] == 'validation' and run.judge not in judges:
        missing.append(f'{run.judge} on the validation split')
    return f'unfinished: the last step lacks {", ".join(missing)}' if missing else ''
