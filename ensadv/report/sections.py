"""The report's sections: each writes its files, and returns its part of the page."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from ensadv.attacks import registry
from ensadv.report import (
    analysis,
    basis,
    computation,
    drawing,
    figures,
    findings,
    member_figures,
    members,
    over_training,
    page,
    paper,
    pictures,
    stages,
    table1,
    tables,
)
from ensadv.report.collect import Collection, strongest
from ensadv.report.run import Run, by_name, name_of
from ensadv.report.table1 import attack_name
from ensadv.storage import files, records, selection, workdir

# What an earlier report may have written that this one does not.
_OLD = (
    *(f'figure{of}.{kind}' for of in ('2*', '3*', '4_*', '_*') for kind in ('png', 'pdf')),
    *(
        f'{of}.{kind}'
        for of in ('differences', 'computation', 'members', 'over_training', 'stages_*')
        for kind in ('csv', 'tex')
    ),
    'table1.md',
)


class Writer:
    """Writes the report's files, and remembers which."""

    def __init__(self, folder: epath.Path):
        self.folder = folder
        self._written: set[str] = set()

    def text(self, name: str, content: str) -> None:
        self._written.add(name)
        files.write_bytes(self.folder / name, content.encode())

    def figure(self, name: str, figure: Figure, caption: str, alt: str) -> page.FigureBlock:
        """Writes a figure as PNG and PDF; returns its place on the page."""
        png = drawing.save(figure, self.folder / name)
        self._written |= {f'{name}.png', f'{name}.pdf'}
        return page.FigureBlock(png, caption, alt, name)

    def table(
        self, table: tables.Table, header: Sequence[str], rows: Sequence[Sequence[Any]]
    ) -> tables.Table:
        """Writes a table as LaTeX and its numbers as CSV; returns its place on the page."""
        self.text(f'{table.name}.csv', tables.to_csv(header, rows))
        self.text(f'{table.name}.tex', tables.to_latex(table))
        return table

    def remove_old(self) -> None:
        """Removes figures and tables of an earlier report that this one has not."""
        for pattern in _OLD:
            for path in self.folder.glob(pattern):
                if path.name not in self._written:
                    path.unlink()


def claims(outcomes: findings.Outcomes, notes: Sequence[str]) -> page.Section:
    """The paper's claims; nothing where none can be judged."""
    blocks = findings.judge_claims(outcomes, notes)
    text = (
        'In accuracy of the last snapshots under the strongest attack that all runs have: '
        'AutoAttack where all have it, else the one with the most steps. Supported: the whole '
        '95 % interval of the difference is above 0, with '
        f'{findings.SEEDS_NEEDED} or more seeds of each system.'
    )
    title, texts = "The paper's claims", [text]
    if scale := paper.other_scale(outcomes.systems):
        title = "The paper's claims, at another scale"
        texts.append(f'This is not the scale of the paper, where they may hold or fail: {scale}.')
    return page.Section(title, 'claims', [*texts, *blocks] if blocks else [])


def accuracy(
    collection: Collection,
    numbers: Sequence[table1.Numbers],
    notes: Sequence[str],
    writer: Writer,
) -> page.Section:
    blocks = [each.table for each in numbers]
    blocks += [
        writer.table(table, stages.CsvRow._fields, rows)
        for table, rows in stages.tables(collection)
    ]
    return page.Section('Accuracy', 'accuracy', [*blocks, notes])


def accuracy_over_training(collection: Collection, writer: Writer) -> page.Section:
    """Figures 2a and 2b, of whatever attacks are there; of one evaluation each there is no line."""
    runs = collection.runs
    short = [a for a in collection.over_training if any(name_of(a) in r.wanted for r in runs)]
    named, attacks = by_name(short), []
    if most := selection.strongest(list(named)):
        chosen = selection.selection_attack(list(named)), 'pgd20' if 'pgd20' in named else most
        attacks = [strongest(named[name], runs) for name in chosen]
    blocks = []
    # One figure where both are the same attack.
    for name, attack in zip(('figure2a', 'figure2b'), dict.fromkeys(attacks), strict=False):
        bands, points = {}, {}
        given = {system: len(runs) for system, runs in collection.systems.items() if runs[0].model}
        for system, runs in collection.systems.items():
            if system in given:
                continue
            series = [table1.cleaned(r, attack) for r in runs if attack in r.attacks(r.steps)]
            if series:
                bands[system] = analysis.average_over_seeds(series)
                points[system] = min(len(steps) for steps, _ in series)
        if all(len(band.steps) < 2 for band in bands.values()):
            continue
        caption = (
            f'Figure {name[-2:]}. Robust accuracy under {attack_name(attack)} over training, at '
            'the worst iterate. Outliers replaced, series interpolated to 1,000 common steps, '
            'averaged over seeds; bands: the lowest and highest seed.'
            f'{_partial(collection, given | {s: band.seeds for s, band in bands.items()})}'
        )
        figure = figures.over_training(bands, points, attack=attack_name(attack))
        alt = f'Lines of accuracy under {attack_name(attack)} over training steps, by system'
        blocks.append(writer.figure(name, figure, caption, alt))
    shown = [attack for attack in ('clean', *attacks) if attack in collection.over_training]
    if table := over_training.table(collection, list(dict.fromkeys(shown))):
        rows = over_training.csv_rows(collection)
        blocks.append(writer.table(table, over_training.CsvRow._fields, rows))
    return page.Section('Over training', 'training', blocks)


def over_attack_steps(collection: Collection, writer: Writer) -> page.Section:
    """Figure 2c, for each kind of long attack the longest."""
    long = [name for name in collection.attacks if registry.entry(name_of(name)).steps]
    curves = {name: _curves(collection, name) for name in long}
    blocks = []
    for kind in ('pgd', 'ifgsm'):
        named = [n for n in long if curves[n] and registry.entry(name_of(n)).kind == kind]
        attack = strongest(collection.of_all(named) or named, collection.runs)
        if attack is None:
            continue
        figure = figures.over_attack_steps(curves[attack], attack=kind.upper())
        sizes = sorted({c.iterate_n for c in curves[attack].values() if c.iterate_n})
        on = f', on the first {" or ".join(f"{n:,}" for n in sizes)} examples' if sizes else ''
        restarts = _restarts(collection, attack)
        alone = f' Only the first of {restarts} restarts is shown.' if restarts > 1 else ''
        caption = (
            f'Figure 2c. Accuracy over the steps of {attack_name(attack)}, on the snapshots of '
            f'Table 1b. The worst iterate so far cannot rise; the current iterate{on}, can.{alone}'
            f'{_partial(collection, {s: len(c.worst) for s, c in curves[attack].items()})}'
        )
        name = 'figure2c' if kind == 'pgd' else f'figure2c_{kind}'
        alt = f'Lines of accuracy over the number of {kind.upper()} steps, by system'
        blocks.append(writer.figure(name, figure, caption, alt))
    return page.Section('Over attack steps', 'steps', blocks)


def _partial(collection: Collection, seeds: Mapping[str, int]) -> str:
    """Returns which systems are drawn by fewer seeds than there are, as a sentence."""
    runs = {system: len(found) for system, found in collection.systems.items()}
    texts = [f'{s} ({seeds.get(s, 0)} of {n})' for s, n in runs.items() if seeds.get(s, 0) < n]
    return f' Not all seeds have it: {", ".join(texts)}.' if texts else ''


def _restarts(collection: Collection, attack: str) -> int:
    """Returns the number of restarts of an attack with steps, the same for all runs."""
    results = [run.attacks(run.steps) for run in collection.runs]
    return next(found[attack]['settings']['restarts'] for found in results if attack in found)


def _curves(collection: Collection, attack: str) -> dict[str, figures.AttackCurve]:
    """Returns the curves of a long attack on the best snapshots; none if it has none."""
    curves = {}
    for system, runs in collection.systems.items():
        results = [run.attacks(run.best).get(attack, {}) for run in runs if run.best is not None]
        found = [result for result in results if result.get('curve', {}).get('steps')]
        if not found:
            continue
        steps = found[0]['curve']['steps']
        unknown = [np.nan] * len(steps)
        curves[system] = figures.AttackCurve(
            np.array(steps),
            np.array([result['curve']['accuracy'] for result in found]),
            np.array([result['curve']['iterate_accuracy'] or unknown for result in found]),
            found[0]['n'],
            found[0]['curve']['iterate_n'],
        )
    return curves


def differences(outcomes: findings.Outcomes, writer: Writer) -> page.Section:
    blocks: list[Any] = []
    if outcomes.strongest and len(outcomes.systems) > 1:
        found = {attack: findings.differences(outcomes, attack) for attack in outcomes.attacks}
        shown = found[outcomes.strongest]
        attack = attack_name(outcomes.strongest)
        rows = [(f'{d.first} − {d.second}', d.difference_points, d.low, d.high) for d in shown]
        caption = f'Differences in accuracy under {attack}, with 95 % paired-bootstrap intervals.'
        alt = f'Intervals of the differences between systems under {attack}'
        figure = figures.differences(rows, attack=attack)
        numbers = list(itertools.chain.from_iterable(found.values()))
        blocks = [
            writer.figure('figure_differences', figure, caption, alt),
            writer.table(findings.differences_table(shown), findings.Difference._fields, numbers),
        ]
    return page.Section('Are the differences real?', 'differences', blocks)


def members_of_ensembles(collection: Collection, writer: Writer) -> page.Section:
    """What members do under attack, of the ensembles whose runs --mode=members was made on."""
    systems, others = members.by_system(collection)
    blocks: list[Any] = []
    if systems:
        contents = {s: [content for _, content in found] for s, found in systems.items()}
        attack = next(iter(next(iter(contents.values()))[0]['attacks']))
        name = attack_name(attack)
        caption = (
            f'Above: accuracy of each member, and of all as one, on the examples that {name} made '
            'on each of them; bold: on its own. Below: on how many images so many members err at '
            'once, of the examples made on all as one; diamonds: members with the same rates of '
            'errors that err independently of each other. Lines: 95 % intervals; of several runs, '
            'from the lowest to the highest.'
        )
        alt = f'Accuracies of members on examples of {name}, and how many members err at once'
        blocks = [
            writer.figure('figure_members', member_figures.members(contents, attack), caption, alt),
            writer.table(members.table(contents), members.CSV_HEADER, members.csv_rows(systems)),
        ]
        if others:
            blocks.append(f'Made with other settings, and left out: {", ".join(others)}.')
    return page.Section(members.TITLE, members.NAME, blocks)


def computation_costs(outcomes: findings.Outcomes, writer: Writer) -> page.Section:
    blocks: list[Any] = []
    if attack := outcomes.strongest:
        accuracy = {system: outcomes.accuracy(system, attack) for system in outcomes.systems}
        costs = {system: computation.of_system(runs) for system, runs in outcomes.systems.items()}
        panels = computation.panels(costs, accuracy)
        if panels:
            caption = (
                f'Accuracy under {attack_name(attack)} against computation, with 95 % intervals. '
                'Line: the Pareto front; filled: on it.'
            )
            alt = 'Robust accuracy of each system against measures of its computation'
            figure = figures.computation(panels, accuracy)
            blocks.append(writer.figure('figure_computation', figure, caption, alt))
        n = outcomes.correct[attack].shape[1]
        table = computation.table(costs, accuracy, attack, panels, n)
        numbers = computation.csv_rows(costs, accuracy, attack, panels)
        blocks.append(writer.table(table, computation.CSV_HEADER, numbers))
    return page.Section('Robustness and computation', 'computation', blocks)


def examples(collection: Collection, writer: Writer) -> page.Section:
    """A page of images, each system by its first run that kept some of the same."""
    columns, first, left_out = {}, None, []
    for system, runs in collection.systems.items():
        kept = [(run, found) for run in runs if (found := _stored_examples(run)) is not None]
        first = first or next(iter(kept), None)
        kept = [each for each in kept if _same_examples(each[1], first[1])]
        if not kept:
            left_out.append(system)
            continue
        run, found = kept[0]
        columns[f'{system}, seed {run.seed}' if len(runs) > 1 else system] = pictures.ExampleColumn(
            found['adversarial'],
            np.exp(found['clean_log_probs']),
            np.exp(found['adversarial_log_probs']),
        )
    if first is None:
        return page.Section('Examples', 'examples', [])
    run, found = first
    settings = json.loads(str(found['settings']))
    attack = f'{settings["attack"].upper()}{settings["steps"]}'
    own = selection.as_configured(attack.lower(), settings, run.config)
    others = ', '.join(selection.differences(settings, [own]))
    figure = pictures.examples(
        found['image'],
        found['label'],
        columns,
        epsilon=_shown_as_white(settings, found),
        attack=attack,
        class_names=basis.class_names(run),
    )
    caption = (
        f'The first test images, the worst point that {attack}{f" ({others})" if others else ""} '
        'found for each system at its last '
        f'snapshot, and the perturbation (magnified). The images were not chosen: they are the '
        f'first of the test split.'
        f'{in_grey(found["image"])}'
    )
    alt = 'Test images, adversarial images and perturbations, with predictions before and after'
    blocks: list[Any] = [writer.figure('figure_examples', figure, caption, alt)]
    if left_out:
        blocks.append(f'No examples, or others, are stored for {", ".join(left_out)}.')
    return page.Section('Examples', 'examples', blocks)


def _shown_as_white(settings: Mapping[str, Any], found: Mapping[str, np.ndarray]) -> float:
    """Returns the perturbation of a pixel that is white: of linf epsilon, of l2 the largest."""
    if settings.get('norm', 'linf') == 'linf':
        return settings['epsilon']
    moves = np.abs(found['adversarial'] - found['image'] / np.float32(255))
    return float(moves.max()) or settings['epsilon']


def _stored_examples(run: Run) -> Mapping[str, np.ndarray] | None:
    """Returns a run's stored examples; None if it has none that can be shown."""
    try:
        found = workdir.read_examples(run.path, run.steps)
        return found if found is not None and _are_examples(found, run) else None
    except Exception:  # whatever storage, zipfile, NumPy and JSON raise; it is only left out
        return None


def _are_examples(found: Mapping[str, np.ndarray], run: Run) -> bool:
    """Returns whether arrays are what `workdir.read_examples` says, where none is missing."""
    label, image, classes = found['label'], found['image'], run.record['dataset']['num_classes']
    settings = json.loads(str(found['settings']))
    return (
        records.mismatch(settings, records.ATTACK_SETTINGS) is None
        and settings['epsilon'] > 0
        and (image.dtype, image.ndim, image.size > 0) == (np.uint8, 4, True)
        and (label.dtype.kind, label.shape) == ('i', image.shape[:1])
        and 0 <= label.min() <= label.max() < classes
        and (found['adversarial'].dtype.kind, found['adversarial'].shape) == ('f', image.shape)
        and all(
            (found[name].dtype.kind, found[name].shape) == ('f', (len(label), classes))
            for name in ('clean_log_probs', 'adversarial_log_probs')
        )
    )


def _same_examples(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    """Returns whether two files hold the same images, attacked in the same way."""
    settings = [json.loads(str(each['settings'])) | {'combine': None} for each in (a, b)]
    return settings[0] == settings[1] and np.array_equal(a['image'], b['image'])


def in_grey(images: np.ndarray) -> str:
    """Returns how images [m, H, W, C] are drawn if not as they are, as a sentence of a caption."""
    sentence = pictures.in_grey(images.shape[-1])
    return f' {sentence}' if sentence else ''


def how_made(collection: Collection) -> page.Section:
    return page.Section(basis.TITLE, 'basis', [basis.all_of_it(collection)])


def apart(collection: Collection) -> page.Section:
    return page.Section(basis.APART_TITLE, 'apart', [basis.apart(collection)])
