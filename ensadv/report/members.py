"""What the members of ensembles do, from the files of --mode=members: a table of systems."""

import collections
import functools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from ensadv.errors import UserError
from ensadv.report import tables
from ensadv.report.collect import Collection
from ensadv.report.run import Run
from ensadv.report.table1 import attack_name
from ensadv.report.tables import Row, Table
from ensadv.storage import member_files

TITLE, NAME = 'What do the members do?', 'members'
_OF_A_SYSTEM = ('combine', 'weights')  # settings in which systems may differ
CSV_HEADER = ('system', 'seed', 'measure', 'value', 'low', 'high', 'n')

Content = Mapping[str, Any]  # of eval/<step>_members.json
Estimate = Mapping[str, Any]


class Measure(NamedTuple):
    """A row of the table.

    Attributes:
      label: what it is; of a row that belongs to the one above, what differs.
      path: the keys that lead to its estimate in a file's content.
      unit: '%' of shares; 'epsilons' of distances, which may be beyond all that was looked at; ''.
      kind: of the row.
    """

    label: str
    path: tuple[str | int, ...]
    unit: str = ''
    kind: str = ''

    def of(self, content: Content) -> Estimate:
        return functools.reduce(lambda found, key: found[key], self.path, content)


def measures(like: Content) -> Iterator[Measure]:
    """Yields the rows of a table of contents that were made with the settings of this one."""
    yield Measure('accuracy, clean images: the ensemble', ('clean', 'accuracy', -1), '%')
    yield Measure('a member', ('clean', 'accuracy_of_members'), '%', 'secondary')
    for attack in like['attacks']:
        path, shown = ('attacks', attack), f'accuracy, {attack_name(attack)} on'
        on_whole = (*path, 'on_whole')
        yield Measure(f'{shown} the ensemble: the ensemble', (*on_whole, 'accuracy', -1), '%')
        yield Measure('a member', (*on_whole, 'accuracy_of_members'), '%', 'secondary')
        yield Measure(f'{shown} a member: that member', (*path, 'member_itself'), '%')
        yield Measure('another member', (*path, 'another_member'), '%', 'secondary')
        yield Measure('the ensemble', (*path, 'whole_by_member'), '%', 'secondary')
        yield Measure(f'{shown} all but one member: these', (*path, 'without_a_member'), '%')
    # Of what follows the first attack tells enough.
    first = next(iter(like['attacks']))
    yield from _predictions('clean images', ('clean',))
    on_whole = ('attacks', first, 'on_whole')
    yield from _predictions(f'{attack_name(first)} on the ensemble', on_whole)
    for kind, label, unit in (
        ('cosine', 'cosine of two gradients', ''),
        ('sign', 'equal signs of two gradients', '%'),
    ):
        for number, where in enumerate(like['gradients']):
            place = {'clean': 'clean images'}.get(where, where.replace('step_', 'after step '))
            text = place if number else f'{label}: {place}'
            yield Measure(text, ('gradients', where, kind), unit, 'secondary' if number else '')
    for where in ('adversarial', 'random'):
        path, label = ('distances', where), f'distance to an error, {where} direction: the ensemble'
        yield Measure(label, (*path, 'distance', -1), 'epsilons')
        yield Measure('a member', (*path, 'distance_of_members'), 'epsilons', 'secondary')


def _predictions(where: str, path: tuple[str, ...]) -> Iterator[Measure]:
    """Yields what members predict on some images."""
    yield Measure(f'all members err, {where}', (*path, 'erring', 'observed', -1), '%')
    independent = (*path, 'erring', 'independent', -1)
    yield Measure('if they erred independently', independent, '%', 'secondary')
    yield Measure(f'two members differ, {where}', (*path, 'disagreement'), '%')
    yield Measure(f'KL of two members, {where}', (*path, 'kl'))
    yield Measure(f'margin, {where}: the ensemble', (*path, 'margin', -1))
    yield Measure('a member', (*path, 'margin_of_members'), '', 'secondary')
    below = (*path, 'below_whole_of_members')
    yield Measure('a member below the ensemble (%)', below, '%', 'secondary')


def table(systems: Mapping[str, Sequence[Content]]) -> Table:
    """Returns a table with a column for each system, of its runs' contents."""
    like = next(iter(systems.values()))[0]
    rows = [Row(('members', *(str(contents[0]['k']) for contents in systems.values())))]
    if any(len(contents) > 1 for contents in systems.values()):
        rows.append(Row(('runs', *(str(len(contents)) for contents in systems.values()))))
    for measure in measures(like):
        cells = (_cell(measure, contents) for contents in systems.values())
        rows.append(Row((measure.label, *cells), measure.kind))
    return Table(NAME, 'Members of ensembles', ('', *systems), tuple(rows), tuple(_notes(systems)))


def _cell(measure: Measure, contents: Sequence[Content]) -> str:
    """Returns an estimate and its interval; of several runs the mean and deviation of theirs."""
    found = [measure.of(content) for content in contents]
    radius = contents[0]['settings']['radius']
    values = [each['value'] for each in found]
    if not all(each['n'] for each in found):
        return '-'
    number = lambda value: _number(value, measure.unit, radius)
    if len(found) == 1:
        return f'{number(values[0])} [{number(found[0]["low"])}, {number(found[0]["high"])}]'
    if None in values:
        return f'{number(None)} ({values.count(None)} of {len(values)} runs)'
    return f'{number(statistics.mean(values))} ± {number(statistics.stdev(values))}'


def _number(value: float | None, unit: str, radius: float) -> str:
    if value is None:
        return f'> {radius:g}' if unit == 'epsilons' else '-'
    return f'{100 * value:.1f}' if unit == '%' else f'{value:.2f}'


def _notes(systems: Mapping[str, Sequence[Content]]) -> Iterator[str]:
    """Yields what the numbers rest on."""
    contents = [content for found in systems.values() for content in found]
    settings = contents[0]['settings']
    attacks = list(settings['attacks'])
    shown = ', '.join(map(attack_name, attacks))
    yield (
        f'Accuracies and shares in %, on the first {contents[0]["n"]:,} evaluated test images, all '
        f'of them, each at the worst point that the attack found for what it was made on ({shown}).'
        ' a member: the mean over the members, or over pairs of them.'
    )
    yield (
        'In brackets 95 % intervals over images: of a share by Wilson, else by the bootstrap. Of '
        'several runs the mean ± standard deviation over runs.'
    )
    yield (
        'Independent members have the same rates of errors, and err on images that have nothing to '
        'do with each other: where some images are harder than others, members err together more '
        'often than these.'
    )
    yield (
        'Margins in log-probability, medians over images; KL in nats. Distances in epsilons, '
        'medians over the images that are right without an attack, along straight lines that may '
        f'leave [0, 1], up to {settings["radius"]:g}; adversarial: towards the example of what is '
        'measured.'
    )
    for system, found in systems.items():
        if text := _without_gradient(found):
            yield f'{system}: {text}.'


def _without_gradient(contents: Sequence[Content]) -> str:
    """Returns which attacks found no gradient on how many images; '' if all found some."""
    parts = []
    for attack in contents[0]['attacks']:
        counts = [sum(values) for values in zip(
            *(content['attacks'][attack]['no_gradient'] for content in contents), strict=True
        )]  # fmt: skip
        names = [*(f'member {i}' for i in range(1, len(counts))), 'the ensemble']
        parts += [
            f'{count:,} images of {name} under {attack_name(attack)}'
            for name, count in zip(names, counts, strict=True)
            if count
        ]
    return f'not really attacked, for want of a gradient, are {", ".join(parts)}' if parts else ''


def csv_rows(systems: Mapping[str, Sequence[tuple[str, Content]]]) -> list[tuple[Any, ...]]:
    """Returns every number of a table, and of the figure; systems have seeds and contents."""
    rows = []
    for system, found in systems.items():
        for seed, content in found:
            named, above = {}, ''
            for measure in measures(content):
                above = measure.label.partition(':')[0] if not measure.kind else above
                name = f'{above}: {measure.label}' if measure.kind else measure.label
                named[name] = measure.of(content)
            for attack, under in content['attacks'].items():
                names = [*map(str, range(1, content['k'] + 1)), 'all']
                for made_on, cells in zip(names, under['transfer'], strict=True):
                    for judged, cell in zip(names, cells, strict=True):
                        named[f'{attack_name(attack)} on {made_on}, judged {judged}'] = cell
                for kind, counts in under['on_whole']['erring'].items():
                    for count, cell in enumerate(counts):
                        named[f'{attack_name(attack)}: {count} members err, {kind}'] = cell
            for name, each in named.items():
                rows.append((system, seed, name, *(each[of] for of in CSV_HEADER[3:])))
    return rows


def read(run: Run) -> Content | None:
    """Returns what is known of a run's members at its last step; None where it is nothing."""
    try:
        return member_files.read(run.path, run.steps)
    except UserError:
        return None


def by_system(
    collection: Collection,
) -> tuple[dict[str, list[tuple[str, Content]]], list[str]]:
    """Returns seeds and contents by system, all made with the same settings, and who has others."""
    found = {run: content for run in collection.runs if (content := read(run))}
    counts = collections.Counter(map(_settings, found.values()))
    usual = counts.most_common(1)[0][0] if counts else ''
    systems: dict[str, list[tuple[str, Content]]] = {}
    for run, content in found.items():
        if _settings(content) == usual:
            systems.setdefault(run.system, []).append((run.seed, content))
    others = [run.name for run, content in found.items() if _settings(content) != usual]
    return systems, others


def _settings(content: Content) -> str:
    def kept(values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {key: kept(value) for key, value in values.items() if key not in _OF_A_SYSTEM}

    return json.dumps([content['n'], kept(content['settings'])], sort_keys=True)


def show(folder: epath.Path, content: Content) -> epath.Path:
    """Prints a run's table, and draws its figure beside its files; returns the JSON's path."""
    print(f'\n{tables.to_markdown(table({content["system"]: [content]}))}')
    path = member_files.path_of(folder, content['step'])
    from ensadv.report import drawing, member_figures  # Matplotlib takes long to import

    figure = member_figures.members({content['system']: [content]}, next(iter(content['attacks'])))
    drawing.save(figure, path.with_suffix(''))
    for suffix in ('.json', '.npz', '.png', '.pdf'):
        print(path.with_suffix(suffix))
    return path
