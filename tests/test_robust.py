"""Robust accuracy, where an image has to stand under every attack: in files and in reports."""

import csv
import io

import numpy as np
import pytest
from etils import epath
from report_runs import N, run_config, write_run

from ensadv.report import stages, table1, tables
from ensadv.report.collect import collect
from ensadv.storage import files, ledgers


def step(**attacks):
    """Results and ledger of '+' (stands), '-' (fooled) and '0' (stands, no gradient) by attack."""
    results, ledger = [], {}
    for name, outcomes in attacks.items():
        results.append({'name': name, 'settings': {}, 'key': f'{name}_key'})
        ledger[f'{name}_key_margin'] = np.array([{'-': -1.0}.get(o, 1.0) for o in outcomes])
        ledger[f'{name}_key_correct'] = np.array([o == '+' for o in outcomes])
    return results, ledger


@pytest.mark.parametrize(
    'attacks, counted, no_gradient',
    [
        # Fooled by one is enough, be it clean or the transfer set.
        ({'clean': '++++-', 'blackbox': '+-+++', 'pgd5': '++-++'}, '+--+-', 0),
        # Another attack found a gradient, where one found none; clean and blackbox look for none.
        ({'clean': '+++', 'blackbox': '+++', 'pgd5': '0+0', 'pgd20_m': '+00'}, '++-', 1),
        ({'clean': '++-', 'blackbox': '+-+'}, '+--', 0),
        # Over the examples that all of them had.
        ({'clean': '+++++', 'pgd5': '+-+++', 'autoattack': '++-'}, '+--', 0),
    ],
)
def test_an_example_counts_if_it_stands_under_every_attack(attacks, counted, no_gradient):
    found = ledgers.robust(*step(**attacks))
    expected = counted.count('+')
    assert found == {
        'n': len(counted),
        'correct': expected,
        'accuracy': expected / len(counted),
        'no_gradient': no_gradient,
        'attacks': [f'{name}_key' for name in attacks],
    }


def test_clean_alone_is_no_attack_and_a_ledger_that_lacks_one_says_nothing():
    assert ledgers.robust(*step(clean='++')) is None
    results, ledger = step(clean='++', pgd5='+-')
    del ledger['pgd5_key_margin']
    assert ledgers.robust(results, ledger) is None


AUTOATTACK = {'eval__long_attacks': ('pgd500', 'autoattack'), 'eval__autoattack__examples': 10}


def some(*places, n=N):
    return np.isin(np.arange(n), places)


def cells(table, row=0):
    return dict(zip(table.header, table.rows[row].cells, strict=True))


def stage(name, attacked, felled, accuracy):
    return {
        'name': name,
        'attacked': attacked,
        'felled': felled,
        'accuracy': accuracy,
        'seconds': 1,
    }


def test_the_tables_begin_with_it_over_the_attacks_that_all_runs_have(tmp_path):
    mine = {'clean': 0.9, 'ifgsm5': some(0, 1, 2), 'pgd20': some(0, 1, 5), 'pgd500': some(0, 1)}
    attacked = {'autoattack': some(1, 2, n=10)}
    write_run(tmp_path / 'a', run_config(**AUTOATTACK), {40: mine | attacked})
    write_run(tmp_path / 'b', run_config('baseline', **AUTOATTACK), {40: mine | attacked})
    *_, last = found = [each.table for each in table1.tables(collect(epath.Path(tmp_path), ()))]
    assert [table.name for table in found] == ['last_snapshot', 'table1a', 'table1b', 'table1c']
    assert [table.header[3] for table in found] == [
        'robust, n = 10',
        'clean',
        *['robust, n = 10'] * 2,
    ]
    assert cells(last)['robust, n = 10'] == '10.0'  # only example 1
    assert last.header[4:-1] == ('PGD500', 'AutoAttack, n = 10')
    assert 'AutoAttack, n = 10' not in found[1].header + found[2].header
    note = 'that all of these snapshots have: clean, IFGSM5, PGD20, PGD500 and AutoAttack; n = 10.'
    assert sum(note in text for text in found[0].notes) == 1
    # One that lacks AutoAttack takes it from the column of all.
    write_run(tmp_path / 'c', run_config('doubleadv', **AUTOATTACK), {40: mine})
    first = table1.tables(collect(epath.Path(tmp_path), ()))[0]
    assert cells(first.table, 2)['robust'] == '2.0'  # 0 and 1, of 100
    assert any('clean, IFGSM5, PGD20 and PGD500; n = 100.' in text for text in first.table.notes)
    assert first.rows[0].attack == 'robust'


def test_without_a_ledger_it_is_not_known_and_others_keep_theirs(tmp_path):
    outcomes = {40: {'clean': 0.9, 'ifgsm5': 0.5, 'pgd20': 0.4}}
    for seed in (0, 1):
        path = write_run(
            tmp_path / f's{seed}', run_config(seed=seed, eval__long_attacks=()), outcomes
        )
    (path / 'eval' / '40.npz').write_bytes(b'damaged')
    table = table1.tables(collect(epath.Path(tmp_path), ()))[0].table
    assert cells(table)['robust'] == '40.0 (1 of 2)'


def test_autoattack_by_stage_with_its_targets_together(tmp_path):
    made = [
        stage('apgd_ce', 9, 2, 0.7), stage('apgd_t 1', 7, 1, 0.6), stage('apgd_t 2', 6, 2, 0.4),
        stage('fab_t 1', 4, 0, 0.4), stage('fab_t 2', 4, 0, 0.4), stage('square', 4, 1, 0.3),
    ]  # fmt: skip
    result = {'correct': some(0, 1, 2, n=10), 'stages': made}
    attacks = {'clean': 0.9, 'ifgsm5': 0.5, 'pgd20': 0.4, 'pgd500': 0.4}
    write_run(tmp_path / 'a', run_config(**AUTOATTACK), {40: attacks | {'autoattack': result}})
    write_run(tmp_path / 'b', run_config('baseline', **AUTOATTACK), {40: attacks})
    ((table, rows),) = stages.tables(collect(epath.Path(tmp_path), ()))
    assert table.title == 'AutoAttack by stage, last snapshots'
    assert table.header == ('system', 'clean', 'APGD-CE', 'APGD-T', 'FAB-T', 'Square', 'seeds')
    assert [row.cells for row in table.rows] == [
        ('SingleAdv', '90.0', '70.0', '40.0', '40.0', '30.0', '1'),
        ('felled', '1', '2', '3', '0', '1', ''),
    ]
    assert 'n = 10 test examples' in table.notes[0]
    text = tables.to_csv(stages.CsvRow._fields, rows)
    found = [(row['part'], row['felled']) for row in csv.DictReader(io.StringIO(text))]
    assert found == [
        ('clean', '1'),
        ('apgd_ce', '2'),
        ('apgd_t', '3'),
        ('fab_t', '0'),
        ('square', '1'),
    ]


@pytest.mark.parametrize(
    'asked, made, label',
    [
        (10, 10, 'autoattack'),
        (None, None, 'autoattack'),
        (2 * N, None, 'autoattack'),  # as many as there are
        (None, 10, 'autoattack examples=10'),
        (10, None, f'autoattack examples={N}'),
    ],
)
def test_a_label_says_on_how_many_images_where_the_config_does_not(tmp_path, asked, made, label):
    config = run_config(**AUTOATTACK | {'eval__autoattack__examples': made})
    results = {'clean': 0.9, 'ifgsm5': 0.5, 'pgd20': 0.4, 'autoattack': some(0, n=made or N)}
    path = write_run(tmp_path / 'a', config, {40: results})
    content = files.read_json(epath.Path(path) / 'config.json')
    content['config']['eval']['autoattack']['examples'] = asked
    files.write_json(epath.Path(path) / 'config.json', content)
    (run,) = collect(epath.Path(tmp_path), ()).runs
    assert list(run.attacks(40)) == ['clean', 'ifgsm5', 'pgd20', label]
