"""The paper's Table 1 from runs whose numbers are known, and the table of what systems cost."""

import csv
import io
import math

import numpy as np
import pytest
from etils import epath
from report_runs import (
    CIFAR10,
    DIGITS,
    OPERATIONS,
    PAPER_STEPS,
    paper_config,
    run_config,
    write_ensemble,
    write_run,
)

from ensadv.report import computation, paper, table1
from ensadv.report.collect import collect
from ensadv.report.tables import to_csv

LAST = {'clean': 0.9, 'ifgsm5': 0.6, 'pgd20': 0.5, 'pgd500': 0.4}
# As it stands in the paper's text; its Table 1c turned, rows for columns.
PAPER_1A = """
Baseline	0.94	0.34	0.15	0.01	0.27
Ensemble2	0.94	0.59	0.44	0.30	0.22
Ensemble4	0.91	0.50	0.40	0.34	0.26
SingleAdv	0.82	0.55	0.44	0.43	0.80
DoubleAdv	0.83	0.57	0.46	0.44	0.82
Ensemble2Adv	0.85	0.62	0.55	0.52	0.83
Ensemble4Adv	0.87	0.66	0.58	0.53	0.85
"""
PAPER_1B = """
Baseline	0.95	0.57	0.29	0.09	0.26
Ensemble2	0.95	0.65	0.52	0.38	0.22
Ensemble4	0.93	0.60	0.48	0.43	0.24
SingleAdv	0.84	0.57	0.46	0.45	0.81
DoubleAdv	0.85	0.60	0.48	0.47	0.84
Ensemble2Adv	0.87	0.64	0.56	0.52	0.85
Ensemble4Adv	0.88	0.67	0.58	0.52	0.86
"""
PAPER_1C = """
Baseline	0.16	0.04
SingleAdv	0.46	0.44
DoubleAdv	0.47	0.47
Ensemble2	0.13	0.02
Ensemble2Adv	0.55	0.52
Separate2Adv	0.49	0.47
"""


@pytest.mark.parametrize(
    'text, found, attacks',
    [
        (PAPER_1A, paper.TABLE_1A, ['clean', 'ifgsm5', 'pgd5', 'pgd20', 'blackbox']),
        (PAPER_1B, paper.TABLE_1B, ['clean', 'ifgsm5', 'pgd5', 'pgd20', 'blackbox']),
        (PAPER_1C, paper.TABLE_1C, ['ifgsm500', 'pgd500']),
    ],
)
def test_the_papers_numbers(text, found, attacks):
    rows = [line.split('\t') for line in text.strip().split('\n')]
    expected = {
        system: dict(zip(attacks, map(float, numbers), strict=True)) for system, *numbers in rows
    }
    assert found == expected


class Report:
    """The tables of the runs below a directory."""

    def __init__(self, root):
        self.collection = collect(epath.Path(root), paper.SYSTEMS)
        assert not self.collection.apart
        self.numbers = {each.table.name: each for each in table1.tables(self.collection)}

    def notes(self, table: str) -> str:
        return ' '.join(self.numbers[table].table.notes)

    def cell(
        self, table: str, attack: str, system: str = 'SingleAdv', kind: str = ''
    ) -> str | None:
        """Returns the cell of a system's row of a kind; None if there is no such row."""
        of = None
        content = self.numbers[table].table
        for row in content.rows:
            of = row.cells[0] if row.kind == '' else of
            if (of, row.kind) == (system, kind):
                return row.cells[content.header.index(attack)]
        return None

    def csv(self, table: str, **wanted: str) -> list[dict[str, str]]:
        """Returns the rows of the CSV in which these columns have these values."""
        text = to_csv(table1.CsvRow._fields, self.numbers[table].rows)
        rows = list(csv.DictReader(io.StringIO(text)))
        assert all(row['table'] == table for row in rows)
        return [row for row in rows if wanted.items() <= row.items()]


def write(root, evaluations, system='singleadv', seed=0, **changes):
    config = run_config(system, seed=seed, **changes)
    return write_run(root / f'{system}{seed}', config, evaluations)


def series(values, **last) -> dict[int, dict[str, float]]:
    """Returns evaluations up to step 40, whose PGD20 accuracies these are."""
    steps = range(41 - len(values), 41)
    found = {step: LAST | {'pgd20': v} for step, v in zip(steps, values, strict=True)}
    for step in steps:
        del found[step]['pgd500']
    found[40] |= {'pgd500': 0.4} | last
    return found


def test_last_snapshot_is_the_mean_and_deviation_over_seeds(tmp_path):
    write(tmp_path, {20: LAST, 40: LAST | {'pgd20': 0.60}}, seed=0)
    write(tmp_path, {20: LAST, 40: LAST | {'pgd20': 0.64}}, seed=1)
    write(tmp_path, {20: LAST, 40: LAST}, 'baseline')
    found = Report(tmp_path)
    # Deviations of 2 points each, so sqrt((4 + 4) / (2 - 1)) = 2.828...
    assert found.cell('last_snapshot', 'PGD20') == '62.0 ± 2.8'
    assert found.cell('last_snapshot', 'seeds') == '2'
    assert found.cell('last_snapshot', 'PGD20', 'Baseline') == '50.0'
    assert found.cell('last_snapshot', 'PGD500') == '40.0 ± 0.0'
    assert found.cell('last_snapshot', 'PGD20', kind='paper') is None
    assert 'n = 100 test examples' in found.notes('last_snapshot')
    assert 'last step (40)' in found.notes('last_snapshot')
    (row,) = found.csv(
        'last_snapshot', system='SingleAdv', seed='all', attack='pgd20', reading='worst iterate'
    )
    assert float(row['accuracy']) == pytest.approx(0.62)
    assert float(row['standard_deviation']) == pytest.approx(math.sqrt(0.0008))
    assert (row['lowest'], row['highest']) == ('0.6', '0.64')
    assert (row['seeds'], row['n']) == ('2', '100')
    (row,) = found.csv(
        'last_snapshot', system='SingleAdv', seed='1', attack='pgd20', reading='worst iterate'
    )
    assert (row['accuracy'], row['step'], row['evaluations']) == ('0.64', '40', '1')
    assert row['standard_deviation'] == ''


def test_only_the_last_ten_evaluations_are_averaged(tmp_path):
    write(tmp_path, series([0.0] * 2 + [0.5] * 5 + [0.6] * 5))
    found = Report(tmp_path)
    assert found.cell('table1a', 'PGD20') == '55.0'
    assert found.cell('last_snapshot', 'PGD20') == '60.0'
    assert 'PGD500' not in found.numbers['table1a'].table.header
    (row,) = found.csv('table1a', attack='pgd20', seed='0', reading='worst iterate')
    assert (row['evaluations'], row['step']) == ('10', '40')
    assert 'fewer than 10' not in found.notes('table1a')


def test_an_outlier_is_replaced_before_averaging(tmp_path):
    values = np.full(60, 0.5)
    values[55] = 0.0
    write(tmp_path, {step + 1: LAST | {'pgd20': v} for step, v in enumerate(values)},
          train__steps=60)  # fmt: skip
    found = Report(tmp_path)
    assert found.cell('table1a', 'PGD20') == '50.0'
    # Clean, IFGSM5 and PGD20: 3 x 60 accuracies.
    assert '1 of 180 accuracies' in found.notes('table1a')
    assert 'window is shorter' not in found.notes('table1a')


def test_fewer_evaluations_are_told(tmp_path):
    write(tmp_path, series([0.5, 0.6]))
    write(tmp_path, series([0.5] * 12), 'baseline')
    found = Report(tmp_path)
    assert found.cell('table1a', 'PGD20') == '55.0'
    assert 'Averaged over 2 to 10 evaluations' in found.notes('table1a')
    assert 'fewer than 50 evaluations (here 2 to 12)' in found.notes('table1a')


def test_each_seed_is_taken_at_its_own_best_step(tmp_path):
    short = {'clean': 0.9, 'ifgsm5': 0.6, 'pgd20': 0.5}
    write(tmp_path, {10: short | {'ifgsm5': 0.8, 'pgd20': 0.2, 'pgd500': 0.1}, 40: LAST})
    write(tmp_path, {30: short | {'ifgsm5': 0.7, 'pgd20': 0.4, 'pgd500': 0.3}, 40: LAST}, seed=1)
    found = Report(tmp_path)
    # Each in points 10 off the mean: sqrt(200) = 14.1; IFGSM5 5 off: sqrt(50) = 7.1.
    assert found.cell('table1b', 'PGD20') == '30.0 ± 14.1'
    assert found.cell('table1b', 'IFGSM5') == '75.0 ± 7.1'
    assert found.cell('table1c', 'PGD500') == '20.0 ± 14.1'
    assert found.numbers['table1b'].table.title == 'Table 1b. At the best IFGSM5 step'
    assert '(10 to 30), selected on the test split, as in the paper.' in found.notes('table1b')
    assert 'PGD500' not in found.numbers['table1b'].table.header
    assert 'IFGSM5' not in found.numbers['table1c'].table.header


def test_the_best_step_on_the_validation_split(tmp_path):
    on_test, held_out = LAST | {'ifgsm5': 0.8}, LAST | {'pgd20': 0.3}
    write(
        tmp_path,
        {
            10: on_test | {'validation_ifgsm5': 0.5},
            20: held_out | {'validation_ifgsm5': 0.6},
            40: LAST | {'validation_ifgsm5': 0.4},
        },
        eval__select_on='validation',
        data__validation_examples=100,
    )
    found = Report(tmp_path)
    assert found.cell('table1b', 'PGD20') == '30.0'
    assert found.cell('table1b', 'IFGSM5') == '60.0'
    assert '(20), selected on the validation split.' in found.notes('table1b')


def test_the_title_names_the_attack_that_selects(tmp_path):
    write(tmp_path, {20: {'clean': 0.9, 'pgd3': 0.5}, 40: {'clean': 0.9, 'pgd3': 0.4}},
          eval__attacks=('clean', 'pgd3'), eval__long_attacks=())  # fmt: skip
    found = Report(tmp_path)
    assert found.numbers['table1b'].table.title == 'Table 1b. At the best PGD3 step'
    assert found.cell('table1b', 'PGD3') == '50.0'
    assert 'table1c' not in found.numbers


def test_clean_accuracy_alone_makes_tables(tmp_path):
    write(tmp_path, {40: {'clean': 0.9}}, eval__attacks=('clean',), eval__long_attacks=())
    found = Report(tmp_path)
    assert found.cell('last_snapshot', 'clean') == '90.0'
    assert found.cell('table1b', 'clean') == '90.0'


def test_a_seed_without_a_long_attack_is_counted(tmp_path):
    write(tmp_path, {40: LAST})
    write(tmp_path, {40: {k: v for k, v in LAST.items() if k != 'pgd500'}}, seed=1)
    found = Report(tmp_path)
    assert found.cell('table1c', 'PGD500') == '40.0 (1 of 2)'
    (row,) = found.csv('table1c', attack='pgd500', seed='all', reading='worst iterate')
    assert (row['seeds'], row['standard_deviation']) == ('1', '')


def test_the_long_attacks_table_is_of_the_systems_that_have_some_at_their_best(tmp_path):
    """With eval.long_attacks_on=last the others have them at their last snapshot alone."""
    correct = {name: np.arange(100) < 100 * share for name, share in LAST.items()}
    at = lambda **changes: {name: {'correct': each} for name, each in (correct | changes).items()}
    better = {k: v for k, v in at(ifgsm5=np.arange(100) < 70).items() if k != 'pgd500'}
    write_run(tmp_path / 'single', run_config(), {40: at()}, ledgers=(40,))
    found = {20: better, 40: at()}
    write_run(tmp_path / 'double', run_config('doubleadv'), found, ledgers=(20, 40))
    found = Report(tmp_path)
    table = found.numbers['table1c'].table
    assert [row.cells[0] for row in table.rows if not row.kind] == ['SingleAdv']
    assert found.cell('table1c', 'PGD500') == found.cell('table1c', 'robust') == '40.0'
    assert 'clean, IFGSM5, PGD20 and PGD500' in found.notes('table1c')
    assert found.cell('table1b', 'robust', 'DoubleAdv') == '50.0'
    assert found.cell('last_snapshot', 'PGD500', 'DoubleAdv') == '40.0'


def test_examples_that_were_not_attacked_are_marked(tmp_path):
    write(tmp_path, {40: LAST | {'pgd20': {'correct': 0.5, 'no_gradient': 3}}})
    found = Report(tmp_path)
    assert found.cell('last_snapshot', 'PGD20') == '50.0*'
    assert found.cell('last_snapshot', 'IFGSM5') == '60.0'
    for table in ('last_snapshot', 'table1a', 'table1b'):
        assert '* Some examples were never attacked' in found.notes(table)
    (row,) = found.csv('last_snapshot', attack='pgd20', seed='0', reading='worst iterate')
    assert row['no_gradient'] == '3'


def test_last_iterates_are_beside_and_of_how_many_examples(tmp_path):
    write(tmp_path, {40: LAST | {'pgd20': {'correct': 0.5, 'last_iterate_accuracy': 0.53}}})
    found = Report(tmp_path)
    assert found.cell('last_snapshot', 'PGD20', kind='secondary') == '53.0'
    assert found.cell('table1a', 'PGD20', kind='secondary') == '53.0'
    # The factory's long attack ends at its accuracy, on 10 of 100 examples.
    assert found.cell('table1c', 'PGD500') == '40.0'
    assert found.cell('last_snapshot', 'PGD500', kind='secondary') == '40.0†'
    assert '† On the first 10 examples only' in found.notes('last_snapshot')
    (row,) = found.csv('last_snapshot', attack='pgd500', seed='0', reading='last iterate')
    assert (row['accuracy'], row['n']) == ('0.4', '10')
    (row,) = found.csv('last_snapshot', attack='pgd20', seed='0', reading='last iterate')
    assert (row['accuracy'], row['n']) == ('0.53', '100')


def test_last_iterates_that_equal_the_worst_take_no_row(tmp_path):
    write(tmp_path, {40: LAST})
    found = Report(tmp_path)
    assert found.cell('last_snapshot', 'PGD20', kind='secondary') is None
    assert '†' not in found.notes('last_snapshot')


@pytest.mark.parametrize('change', [{'eval__iterate_examples': 0}, {'eval__pgd__restarts': 3}])
def test_a_last_iterate_that_is_not_known(tmp_path, change):
    differs = {'correct': 0.6, 'last_iterate_accuracy': 0.7}
    write(tmp_path, {40: LAST | {'ifgsm5': differs}}, **change)
    found = Report(tmp_path)
    assert found.cell('last_snapshot', 'PGD500') == '40.0'
    assert found.cell('last_snapshot', 'PGD500', kind='secondary') == '-'
    assert '†' not in found.notes('last_snapshot')
    assert not found.csv('last_snapshot', attack='pgd500', reading='last iterate')


def write_paper(root, system: str, dataset=CIFAR10, **changes) -> None:
    config = paper_config(system, **changes)
    write_run(root / system, config, {config.train.steps: LAST}, dataset=dataset)


def test_the_papers_numbers_stand_beside_those_of_its_systems(tmp_path):
    for system in ('singleadv', 'separate2adv'):
        write_paper(tmp_path, system)
    found = Report(tmp_path)
    assert found.cell('table1a', 'PGD20', kind='paper') == '43'
    assert found.cell('table1b', 'PGD20', kind='paper') == '45'
    assert found.cell('table1c', 'PGD500', kind='paper') == '44'
    assert found.cell('table1c', 'PGD500', 'Separate2Adv', 'paper') == '47'
    assert found.cell('table1a', 'PGD20', 'Separate2Adv', 'paper') is None
    assert 'at the last iterate' in found.notes('table1a')
    assert 'not trained as' not in found.notes('table1a')
    (row,) = found.csv('table1c', system='SingleAdv', attack='pgd500', reading='paper')
    assert (row['accuracy'], row['seeds'], row['n']) == ('0.44', '3', '10000')


@pytest.mark.parametrize(
    'changes',
    [{'dataset': DIGITS}, {'epsilon': 0.05}, {'model__depth': 10}, {'model__width': 2}],
    ids=str,
)
def test_they_do_not_stand_beside_anything_else(tmp_path, changes):
    write_paper(tmp_path, 'singleadv', **changes)
    found = Report(tmp_path)
    for table, attack in (('table1a', 'PGD20'), ('table1b', 'PGD20'), ('table1c', 'PGD500')):
        assert found.cell(table, attack) is not None
        assert found.cell(table, attack, kind='paper') is None
        assert not found.csv(table, reading='paper')
        assert 'paper:' not in found.notes(table)


def test_a_system_of_ones_own_has_none_beside_those_that_have(tmp_path):
    write_paper(tmp_path, 'singleadv')
    write_paper(tmp_path, 'doubleadv', model__width=4)
    config = paper_config('baseline')
    config.system = 'Mine'
    write_run(tmp_path / 'mine', config, {PAPER_STEPS: LAST}, dataset=CIFAR10)
    found = Report(tmp_path)
    assert found.cell('table1a', 'PGD20', kind='paper') == '43'
    assert found.cell('table1a', 'PGD20', 'DoubleAdv', 'paper') is None
    assert found.cell('table1a', 'PGD20', 'Mine', 'paper') is None


@pytest.mark.parametrize('change', [{'loss': 'margin'}, {'restarts': 5}])
def test_the_papers_attacks_have_one_start_and_climb_the_cross_entropy(tmp_path, change):
    changes = {f'eval__pgd__{field}': value for field, value in change.items()}
    write_paper(tmp_path, 'singleadv', **changes)
    found = Report(tmp_path)
    assert found.cell('table1a', 'IFGSM5', kind='paper') == '55'
    assert found.cell('table1a', 'PGD20', kind='paper') == '-'
    assert found.cell('table1c', 'PGD500', kind='paper') is None
    assert not found.csv('table1a', attack='pgd20', reading='paper')


def test_other_training_is_told_beside_the_papers_numbers(tmp_path):
    write_paper(tmp_path, 'singleadv', train__steps=100_000)
    found = Report(tmp_path)
    assert found.cell('table1a', 'PGD20', kind='paper') == '43'
    told = "Ours were not trained like the paper's: train.steps 100,000, not 500,000."
    assert told in found.notes('table1a')


def test_an_ensemble_of_best_snapshots_is_not_said_to_be_unselected(tmp_path):
    members = [write(tmp_path / 'members', {20: LAST, 40: LAST}, seed=seed) for seed in range(2)]
    best = {'ensemble__members_snapshot': 'best'}
    write_ensemble(tmp_path / 'root' / 'e', members, LAST, steps=(20, 20), **best)
    note = Report(tmp_path / 'root').numbers['last_snapshot'].table.notes[1]
    assert note == (
        'Each run at its last step (20); nothing was selected, except for the members of '
        'Separate2Adv.'
    )


def test_one_example(tmp_path):
    right, wrong = np.array([True]), np.array([False])
    write(tmp_path, {40: {'clean': right, 'ifgsm5': right, 'pgd20': wrong}},
          eval__num_examples=1)  # fmt: skip
    found = Report(tmp_path)
    assert found.cell('last_snapshot', 'clean') == '100.0'
    assert found.cell('last_snapshot', 'PGD20') == '0.0'


# Computation.


def costs_of(root) -> dict[str, computation.Costs]:
    systems = collect(epath.Path(root), paper.SYSTEMS).systems
    return {system: computation.of_system(runs) for system, runs in systems.items()}


def test_costs_of_a_run(tmp_path):
    for seed, seconds in enumerate((0.5, 0.9, 0.6)):
        config = run_config(seed=seed, train__batch_size=8)
        write_run(tmp_path / str(seed), config, {40: LAST}, session={'seconds_per_step': seconds})
    (cost,) = costs_of(tmp_path).values()
    # 5e7 operations for each of 8 examples in each of 40 steps.
    assert cost == (1000, 2e6, 1.6e10, 0.6, '1 x cpu, auto')


def test_costs_of_an_ensemble_of_runs_are_its_members(tmp_path):
    folder = tmp_path / 'members'
    members = [
        write_run(folder / 'a', run_config(seed=0), {40: LAST}),
        write_run(
            folder / 'b',
            run_config(seed=1, train__batch_size=16),
            {40: LAST},
            parameters=500,
            operations={name: 2 * count for name, count in OPERATIONS.items()},
        ),
    ]
    write_ensemble(tmp_path / 'root' / 'e', members, LAST)
    (cost,) = costs_of(tmp_path / 'root').values()
    # 2e6 + 4e6; 5e7 x 8 x 40 + 1e8 x 16 x 40; nobody timed it.
    assert cost == (1500, 6e6, 1.6e10 + 6.4e10, None, '')


def test_older_runs_have_no_operations(tmp_path):
    older = write_run(tmp_path / 'a', run_config(), {40: LAST}, operations=None, session={})
    (cost,) = costs_of(tmp_path).values()
    assert cost == (1000, None, None, None, '')
    write_ensemble(tmp_path / 'root' / 'e', [older, tmp_path / 'a'], LAST)
    (cost,) = costs_of(tmp_path / 'root').values()
    assert (cost.forward, cost.training) == (None, None)


def test_times_of_two_machines_are_not_averaged(tmp_path):
    write_run(tmp_path / 'a', run_config(seed=0), {40: LAST})
    gpu = {'seconds_per_step': 0.1, 'devices': {'count': 8, 'kind': 'H100'}}
    write_run(tmp_path / 'b', run_config(seed=1), {40: LAST}, session=gpu)
    (cost,) = costs_of(tmp_path).values()
    assert cost.seconds is None
    assert cost.machine == '1 x cpu, auto and 8 x H100, auto'


def cost(parameters, seconds=1.0, machine='A', forward=1e9, training=1e18):
    return computation.Costs(parameters, forward, training, seconds, machine)


def test_the_pareto_front_of_each_measure():
    # B costs as C and is less robust; D costs more than C and is less robust.
    costs = {'A': cost(1e6), 'B': cost(2e6), 'C': cost(2e6), 'D': cost(4e6, forward=None)}
    accuracy = {'A': 3 * (0.4,), 'B': 3 * (0.45,), 'C': 3 * (0.5,), 'D': 3 * (0.48,)}
    panels = computation.panels(costs, accuracy)
    parameters, forward, training, seconds = panels
    assert parameters.label == 'parameters (millions)'
    assert parameters.cost == {'A': 1, 'B': 2, 'C': 2, 'D': 4}
    assert parameters.front == ['A', 'C']
    assert forward.cost == {'A': 1, 'B': 1, 'C': 1}
    assert forward.front == ['C']
    assert (training.label, training.cost['A']) == ('operations of training (10¹⁸)', 1)
    assert seconds.label == 'seconds per training step (A)'


def test_times_of_different_machines_are_no_panel_and_are_told_apart():
    costs = {'A': cost(1, 1.0, 'cpu'), 'B': cost(2, 0.1, 'H100')}
    panels = computation.panels(costs, {'A': 3 * (0.4,), 'B': 3 * (0.5,)})
    assert [panel.label.split(' (')[0] for panel in panels] == [
        'parameters', 'operations per prediction', 'operations of training',
    ]  # fmt: skip
    table = computation.table(
        costs, {'A': (0.4, 0.3, 0.5), 'B': (0.5, 0.4, 0.6)}, 'pgd20', panels, 1
    )
    assert 'on cpu (A); H100 (B).' in table.notes[-1]


def test_the_table_of_costs():
    costs = {'A': cost(36_479_194, 0.25, 'cpu', 9.999e11, 1.83e18), 'B': cost(1, None, '', None)}
    accuracy = {'A': (0.4, 0.35, 0.4444), 'B': (0.5, 0.4, 0.6)}
    panels = computation.panels(costs, {'A': 3 * (0.4,), 'B': 3 * (0.5,)})
    table = computation.table(costs, accuracy, 'pgd20', panels, 2000)
    assert '(n = 2,000)' in table.notes[0]
    assert table.header[5:] == ('PGD20', 'on the front of')
    assert table.rows[0].cells == (
        'A', '36,479,194', '1e12', '1.83e18', '0.25', '40.0 (35.0 to 44.4)', 'none',
    )  # fmt: skip
    assert table.rows[1].cells[2:5] == ('-', '1e18', '-')
    # Of both measures that are known of two systems.
    assert table.rows[1].cells[6:] == ('all',)


@pytest.mark.parametrize(
    'operations, text',
    [(999.6, '1e3'), (1000, '1e3'), (1.834e18, '1.83e18'), (12_345, '12.3e3'), (7, '7e0')],
)
def test_operations_as_they_are_written(operations, text):
    assert computation._count(operations) == text
