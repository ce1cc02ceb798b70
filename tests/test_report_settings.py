"""The report on attacks that were made with several settings: named, and the strongest counts."""

import json

import numpy as np
from report_runs import (
    CIFAR10,
    PAPER_STEPS,
    N,
    paper_config,
    run_config,
    write_ensemble,
    write_run,
)
from test_report_collect import collected, names, only_reason
from test_report_tables import Report

from ensadv.report import basis, findings, sections
from ensadv.report.collect import strongest
from ensadv.storage import files, workdir

LAST = {'clean': 0.9, 'ifgsm5': 0.6, 'pgd20': 0.5}
MARGIN = {'loss': 'margin'}
BOTH = 'PGD20 (loss=cross_entropy)', 'PGD20 (loss=margin)'
WORST = 'PGD20 (worst case)'


def by_margin(accuracy, **changes):
    return {'correct': accuracy, 'settings': MARGIN, **changes}


def write(root, evaluations, system='singleadv', seed=0, **changes):
    config = run_config(system, seed=seed, **({'eval__long_attacks': ()} | changes))
    ledgers = list(evaluations)
    return write_run(root / f'{system}{seed}', config, evaluations, ledgers=ledgers)


def with_margin(accuracy):
    return LAST | {'pgd20_loss=margin': by_margin(accuracy)}


def outcome(first, last):
    """Correct are the examples from `first` to before `last`."""
    return (np.arange(N) >= first) & (np.arange(N) < last)


def test_a_column_for_each_settings_and_the_worst_case_counts(tmp_path):
    # By seed and loss; both losses leave 20 and 10, in the end the baseline's 0.
    for system, seed, by_entropy, by_margin_ in (
        ('singleadv', 0, outcome(0, 50), outcome(30, 80)),
        ('singleadv', 1, outcome(0, 50), outcome(40, 60)),
        ('baseline', 0, outcome(0, 30), outcome(30, 100)),
    ):
        attacked = {'pgd20': by_entropy, 'pgd20_loss=margin': by_margin(by_margin_)}
        write(tmp_path, {40: LAST | attacked}, system, seed)
    found = Report(tmp_path)
    header = found.numbers['last_snapshot'].table.header
    assert header[3:-1] == ('robust', 'clean', 'IFGSM5', *BOTH, WORST)
    assert found.cell('last_snapshot', BOTH[0]) == '50.0 ± 0.0'
    assert found.cell('last_snapshot', BOTH[1]) == '35.0 ± 21.2'
    assert found.cell('last_snapshot', WORST) == '15.0 ± 7.1'
    assert found.cell('last_snapshot', WORST, 'Baseline') == '0.0'
    assert (
        'PGD20 was made with several settings. The worst case counts: an example is correct only '
        f'if none of those that all runs have, {" and ".join(BOTH)}, fooled it.'
    ) in found.numbers['last_snapshot'].table.notes
    (row,) = found.csv('last_snapshot', system='Baseline', attack='pgd20 loss=margin', seed='0',
                       reading='worst iterate')  # fmt: skip
    assert float(row['accuracy']) == 0.7
    outcomes = findings.read_outcomes(found.collection)
    assert outcomes.strongest == 'pgd20 worst case'
    # By either loss alone, or by the better of the two for each run, it would be another.
    assert outcomes.difference('SingleAdv', 'Baseline', outcomes.strongest).difference_points == 15
    (line,) = (each for each in basis.settings(found.collection) if each.startswith(BOTH[1]))
    assert 'loss margin' in line


def test_the_recipe_is_told(tmp_path):
    recipe = {
        'train__objective': 'trades', 'train__label_smoothing': 0.1, 'train__awp_gamma': 0.005,
        'train__schedule': 'cosine', 'train__warmup_steps': 5, 'train__weight_decay_on': 'kernels',
    }  # fmt: skip
    write(tmp_path / 'paper', {40: LAST})
    rate, attack = basis.training(collected(tmp_path / 'paper'))
    assert 'learning rate 0.1 times 0.2 at 3, momentum 0.9, weight decay 0.0005, auto.' in rate
    assert rate.endswith(' SingleAdv: WRN-10-1.')
    assert attack.startswith('Attack in training: IFGSM2, step_size 0.0375, start gaussian, sigma')
    assert attack.endswith('; rho 1.')
    write(tmp_path / 'trades', {40: LAST}, **recipe)
    rate, attack = basis.training(collected(tmp_path / 'trades'))
    assert 'learning rate 0.1 (cosine) after 5 steps of warm-up, momentum 0.9, ' in rate
    assert 'weight decay 0.0005 on kernels, ' in rate
    assert attack.endswith('; TRADES, beta 6, label smoothing 0.1, AWP with gamma 0.005.')
    write(tmp_path / 'adp', {40: LAST}, 'ensemble2adv', train__diversity='adp')
    _, attack = basis.training(collected(tmp_path / 'adp'))
    assert attack.endswith('; rho 1, cross-entropy of each member, ADP with alpha 2, beta 0.5.')
    newer = {
        'model__activation': 'silu', 'attack__name': 'n_fgsm', 'train__ema_decay': 0.5,
    }  # fmt: skip
    write(tmp_path / 'newer', {40: LAST}, **newer)
    rate, attack, averages = basis.training(collected(tmp_path / 'newer'))
    assert rate.endswith(' SingleAdv: WRN-10-1, silu.')
    assert attack == 'Attack in training: N_FGSM, step_size 0.15, noise 0.3; rho 1.'
    assert averages == 'SingleAdv: results of weights averaged over the steps (decay 0.5).'
    # A run from before there were such fields, beside one that says what it did.
    path = write(tmp_path / 'paper', {40: LAST}, seed=1)
    record = json.loads((path / 'config.json').read_text())
    for field in ('objective', 'beta', 'schedule', 'warmup_steps', 'awp_gamma', 'awp_start'):
        del record['config']['train'][field]
    (path / 'config.json').write_text(json.dumps({k: record[k] for k in record if k != 'crc32'}))
    found = collected(tmp_path / 'paper')
    assert (names(found), found.apart) == (['singleadv0', 'singleadv1'], [])


def test_without_a_ledger_that_of_the_settings_which_fools_the_most_counts(tmp_path):
    path = write(tmp_path, {40: with_margin(0.3)})
    write(tmp_path, {40: with_margin(0.4)}, 'baseline')
    (path / 'eval' / '40.npz').write_bytes(b'damaged')
    found = Report(tmp_path)
    assert found.cell('last_snapshot', WORST) == '-'
    assert f'{BOTH[1]} counts: of those that all runs have, it fooled the most' in found.notes(
        'last_snapshot'
    )


def test_what_only_some_runs_have_is_shown_and_does_not_count(tmp_path):
    write(tmp_path, {40: with_margin(0.1)}, seed=0)
    write(tmp_path, {40: LAST}, seed=1)
    found = Report(tmp_path)
    assert found.cell('last_snapshot', BOTH[1]) == '10.0 (1 of 2)'
    assert found.cell('last_snapshot', BOTH[0]) == '50.0 ± 0.0'
    assert f'{BOTH[0]} counts: of those that all runs have, it fooled the most' in found.notes(
        'last_snapshot'
    )
    assert findings.read_outcomes(found.collection).strongest == 'pgd20 loss=cross_entropy'


def test_a_run_without_the_usual_settings_is_apart(tmp_path):
    write(tmp_path, {40: LAST | {'pgd20': by_margin(0.4)}}, 'baseline')
    write(tmp_path, {40: with_margin(0.4)})
    write(tmp_path, {40: LAST}, 'doubleadv')
    write(tmp_path, {40: LAST}, 'ensemble4')
    assert only_reason(tmp_path) == 'pgd20 with loss margin, not cross_entropy'
    assert names(collected(tmp_path)) == ['ensemble40', 'singleadv0', 'doubleadv0']


def test_settings_other_than_the_configs_are_named_where_they_are_the_only_ones(tmp_path):
    write(tmp_path, {40: LAST | {'pgd20': by_margin(0.4)}})
    found = Report(tmp_path)
    assert found.cell('last_snapshot', BOTH[1]) == '40.0'
    assert 'PGD20' not in found.numbers['last_snapshot'].table.header
    assert 'several settings' not in found.notes('last_snapshot')


def test_what_no_gradient_was_found_for_makes_no_attack_strong(tmp_path):
    # 95 of 100 are not attacked and do not count; the other loss fools 40, 5 of them as this one.
    nothing = {'correct': 0.0, 'no_gradient': 95}
    path = write(tmp_path, {40: LAST | {'pgd20': nothing, 'pgd20_loss=margin': by_margin(0.6)}})
    (run,) = collected(tmp_path).runs
    file = workdir.evaluation_path(run.path, 40, '.npz')
    ledger = files.read_arrays(file)
    stands = ledger['pgd20_margin'] = np.where(np.arange(N) < 95, 1, -1).astype(np.float32)
    assert np.sum(stands > 0) == 95
    files.write_arrays(file, ledger)
    found = Report(tmp_path)
    assert found.cell('last_snapshot', BOTH[0]) == '0.0*'
    # All that the other loss did not fool was attacked, by it.
    assert found.cell('last_snapshot', WORST) == '60.0'
    (path / 'eval' / '40.npz').unlink()
    found = Report(tmp_path)
    assert f'{BOTH[1]} counts: of those that all runs have, it fooled the most' in found.notes(
        'last_snapshot'
    )


def test_means_over_training_are_of_what_was_evaluated_over_training(tmp_path):
    """And not of the best and the last snapshot alone, which were left for the other settings."""
    evaluations = {step: LAST | {'pgd20': 0.5} for step in range(10, 41)}
    for step in (15, 40):
        evaluations[step] = evaluations[step] | {'pgd20_loss=margin': by_margin(0.3)}
    evaluations[15] = evaluations[15] | {'ifgsm5': 0.7}
    write(tmp_path, evaluations)
    found = Report(tmp_path)
    assert found.collection.over_training == ['clean', 'ifgsm5', 'pgd20 loss=cross_entropy']
    assert found.cell('table1a', BOTH[0]) == '50.0'
    assert not {BOTH[1], WORST} & set(found.numbers['table1a'].table.header)
    assert found.cell('table1b', BOTH[1]) == found.cell('table1b', WORST) == '30.0'
    (run,) = found.collection.runs
    np.testing.assert_array_equal(run.series('pgd20 loss=margin')[0], [15, 40])
    assert run.best == 15
    assert not found.collection.notes
    drawn = {}

    class Writer:
        def figure(self, name, figure, caption, alt):
            drawn[name] = caption

        def table(self, table, fields, rows):
            drawn[table.name] = table

    sections.accuracy_over_training(found.collection, Writer())
    assert f'under {BOTH[0]} over training' in drawn['figure2b']


LONG = {'eval__attacks': ('clean', 'pgd20'), 'eval__long_attacks': ('pgd500',)}


def test_more_examples_that_stay_take_the_place_of_fewer(tmp_path):
    """They decide no verdict: the accuracy is the same, and the last iterate's is of more."""
    more = {'correct': 0.4, 'settings': {'iterate_examples': 60}, 'last_iterate_n': 60,
            'last_iterate_accuracy': 0.45}  # fmt: skip
    long = LAST | {'pgd500': 0.4}
    write(tmp_path, {40: long | {'pgd500_iterate_examples=60': more}}, **LONG)
    found = Report(tmp_path)
    assert found.cell('last_snapshot', 'PGD500') == '40.0'
    assert found.cell('last_snapshot', 'PGD500', kind='secondary') == '45.0†'
    assert 'On the first 60 examples' in found.notes('last_snapshot')
    # Where another run has it with fewer alone, both are there.
    write(tmp_path, {40: long}, seed=1, **LONG)
    found = Report(tmp_path)
    assert found.cell('last_snapshot', 'PGD500 (iterate_examples=10)') == '40.0 ± 0.0'
    assert found.cell('last_snapshot', 'PGD500 (iterate_examples=60)') == '40.0 (1 of 2)'


def test_curves_are_those_of_the_strongest(tmp_path):
    long = LAST | {'pgd500': 0.4, 'pgd500_loss=margin': by_margin(0.2)}
    write(tmp_path, {40: long}, **LONG)
    collection = collected(tmp_path)
    assert strongest(collection.attacks, collection.runs) == 'pgd500 worst case'
    drawn = {}

    class Writer:
        def figure(self, name, figure, caption, alt):
            drawn[name] = caption

    sections.over_attack_steps(collection, Writer())
    assert 'the steps of PGD500 (loss=margin), on' in drawn['figure2c']


def test_a_ledger_of_other_settings_is_not_that_of_the_results(tmp_path):
    path = write(tmp_path, {40: with_margin(0.5)})
    file = workdir.evaluation_path(collected(tmp_path).runs[0].path, 40, '.npz')
    ledger = files.read_arrays(file)
    # As many are right with both, so that nothing else shows it.
    for suffix in ('correct', 'settings'):
        ledger[f'pgd20_{suffix}'] = ledger[f'pgd20_loss=margin_{suffix}']
    files.write_arrays(file, ledger)
    assert findings.read_outcomes(collected(tmp_path)).notes == [
        f'{path.name} is left out of the comparisons: its ledger and its results differ in pgd20.'
    ]


def test_older_results_have_no_keys(tmp_path):
    path = write(tmp_path, {40: LAST})
    file = path / 'eval' / '40.json'
    content = files.read_json(file)
    for result in content['attacks']:
        del result['key']
    file.write_text(json.dumps(content))
    found = Report(tmp_path)
    assert found.cell('last_snapshot', 'PGD20') == '50.0'
    outcomes = findings.read_outcomes(found.collection)
    assert (outcomes.attacks, outcomes.notes) == (['clean', 'ifgsm5', 'pgd20'], [])
    assert outcomes.correct['pgd20'].shape == (1, N)


def test_an_ensemble_of_runs_has_columns_beside_a_runs(tmp_path):
    members = [write(tmp_path / 'members', {40: LAST}, seed=seed) for seed in range(2)]
    logits = {'ensemble__combine': 'logits', 'eval__long_attacks': ()}
    write_ensemble(tmp_path / 'root' / 'e', members, with_margin(0.3), **logits)
    write(tmp_path / 'root', {40: with_margin(0.2)})
    found = Report(tmp_path / 'root')
    assert found.cell('last_snapshot', BOTH[1], 'Separate2Adv') == '30.0'
    assert found.cell('last_snapshot', BOTH[1]) == '20.0'


def test_the_papers_numbers_stand_beside_its_own_settings_alone(tmp_path):
    config = paper_config()
    write_run(tmp_path / 'a', config, {PAPER_STEPS: with_margin(0.4)}, dataset=CIFAR10)
    found = Report(tmp_path)
    cells = [found.cell('table1b', attack, kind='paper') for attack in (*BOTH, WORST)]
    assert cells == ['45', '-', '-']
