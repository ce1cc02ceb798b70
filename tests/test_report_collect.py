"""Which runs stand in one table, and why the others do not."""

import numpy as np
import pytest
import report_runs
from etils import epath
from report_runs import DIGITS, N, member, run_config, write_ensemble, write_run

from ensadv.errors import UserError
from ensadv.report import basis, paper
from ensadv.report.collect import Collection, collect

LAST = {'clean': 0.9, 'ifgsm5': 0.6, 'pgd20': 0.5, 'pgd500': 0.4}
RUNS = {40: LAST}


def collected(root) -> Collection:
    return collect(epath.Path(root), paper.SYSTEMS)


def names(collection: Collection) -> list[str]:
    return [run.name for run in collection.runs]


def write(
    root, system='singleadv', seed=0, evaluations=RUNS, *, name='', dataset=DIGITS, **changes
):
    """Writes a run to root/<system><seed>, or root/<name>."""
    config = run_config(system, seed=seed, **changes)
    return write_run(root / (name or f'{system}{seed}'), config, evaluations, dataset=dataset)


def only_reason(root) -> str:
    """Returns the reason of the one run that is apart."""
    ((_, reason),) = collected(root).apart
    return reason


def test_the_factory_writes_what_results_writes(tmp_path):
    from ensadv.evaluation import results
    from ensadv.evaluation.evaluator import LongVerdicts, Verdicts
    from ensadv.storage import files, workdir

    config = run_config()
    one = epath.Path(write_run(tmp_path / 'factory', config, RUNS))
    other = epath.Path(write_run(tmp_path / 'program', config, {}))
    writer = results.Results(config, other, 'label', None)
    writer._environment = report_runs.ENVIRONMENT
    writer._splits = {'test': (None, np.zeros(N, np.int32))}
    writer._places = np.arange(N, dtype=np.int32)
    margin, has = np.ones(N, np.float32), np.ones(N, bool)
    short = Verdicts(margin, margin, has)
    curve = report_runs.CURVE_STEPS
    stands, iterates = np.ones((len(curve), N), bool), np.ones((len(curve), 10))
    long = LongVerdicts(margin, has, np.full(N, -1, np.int32), curve, stands, iterates)
    for unit in (*writer.units, *writer.long_units):
        verdicts = long if unit in writer.long_units else short
        result = writer._result(unit, verdicts) | {'seconds': 1.0}
        writer._add(40, unit, result, verdicts)

    def shape(value):
        """Returns all names in a JSON value, and what is no number as it is."""
        if isinstance(value, dict):
            return {key: shape(each) for key, each in value.items()}
        if isinstance(value, list):
            return [shape(each) for each in value]
        return value if isinstance(value, str) else type(value).__name__

    paths = [workdir.evaluation_path(path, 40, '.json') for path in (one, other)]
    found, expected = (shape(files.read_json(path)) for path in paths)
    for content in (found, expected):
        for attack in content['attacks']:
            attack['seconds'] = None
    assert found == expected
    ledgers = [workdir.read_ledger(path.with_suffix('.npz')) for path in paths]
    assert ledgers[0].keys() == ledgers[1].keys()
    for name in ledgers[0]:
        assert ledgers[0][name].dtype.kind == ledgers[1][name].dtype.kind, name
    settings = [str(ledger['pgd500_settings']) for ledger in ledgers]
    assert settings[0] == settings[1]


def test_systems_stand_in_the_papers_order_and_seeds_by_number(tmp_path):
    write(tmp_path, 'ensemble2adv', 0)
    for seed in (10, 2):
        write(tmp_path, 'singleadv', seed)
    config = run_config()
    config.system = 'Other'
    write_run(tmp_path / 'a', config, RUNS)
    write(tmp_path, 'baseline', 2**31 - 1)
    found = collected(tmp_path)
    assert list(found.systems) == ['Baseline', 'SingleAdv', 'Ensemble2Adv', 'Other']
    assert [run.seed for run in found.systems['SingleAdv']] == ['2', '10']
    assert not found.apart
    assert not found.notes
    assert found.attacks == ['clean', 'ifgsm5', 'pgd20', 'pgd500']


@pytest.mark.parametrize(
    'evaluations, reason',
    [
        ({}, 'unfinished: not evaluated yet, of 40 steps'),
        ({10: LAST, 20: LAST}, 'unfinished: evaluated up to step 20, of 40 steps'),
        ({40: {'clean': 0.9}}, 'unfinished: the last step lacks ifgsm5, pgd20'),
    ],
)
def test_an_unfinished_run_is_apart(tmp_path, evaluations, reason):
    write(tmp_path, evaluations=evaluations)
    found = collected(tmp_path)
    assert found.apart == [('singleadv0', reason)]
    assert not found.runs


def test_a_run_that_lacks_only_a_long_attack_is_not(tmp_path):
    write(tmp_path, evaluations={40: {k: v for k, v in LAST.items() if k != 'pgd500'}})
    assert names(collected(tmp_path)) == ['singleadv0']


def test_a_run_without_the_black_box_that_it_asks_for_is_apart(tmp_path):
    write(tmp_path, eval__blackbox_path='there/blackbox.npz')
    assert only_reason(tmp_path) == 'unfinished: the last step lacks blackbox'


def test_a_run_that_lacks_what_selects_its_best_snapshot_is_apart(tmp_path):
    changes = {'eval__select_on': 'validation', 'data__validation_examples': 100}
    write(tmp_path, **changes)
    assert only_reason(tmp_path) == (
        'unfinished: the last step lacks ifgsm5 on the validation split'
    )


MINORITY = {
    'data': (
        {'dataset': DIGITS | {'fingerprint': 'abcdef01' + 56 * '2'}},
        'data: digits (fingerprint abcdef01...), not digits (fingerprint fa690bd4...)',
    ),
    'epsilon': ({'epsilon': 0.1}, 'epsilon: 0.1, not 0.15'),
    'training examples': (
        {'dataset': DIGITS | {'num_train': 1337}},
        'training examples: 1337, not 1437',
    ),
    'selected by': (
        {'eval__attacks': ('clean', 'pgd20')},
        'snapshots selected by: pgd20, not ifgsm5',
    ),
    'n': ({'eval__num_examples': 50}, 'clean with examples 50, not 100'),
    'attack': ({'eval__pgd__step_size': 0.2}, 'pgd20 with step_size 0.2, not 0.075'),
    'dtype': ({'eval__dtype': 'bfloat16'}, 'clean with dtype bfloat16, not float32'),
    'long attack': (
        {'eval__iterate_examples': 20},
        'pgd500 with iterate_examples 20, not 10',
    ),
}


@pytest.mark.parametrize('change, reason', MINORITY.values(), ids=MINORITY)
@pytest.mark.parametrize('system', ['baseline', 'ensemble4adv'])
def test_the_majority_wins_wherever_it_stands(tmp_path, system, change, reason):
    # The one that differs comes first, or last.
    write(tmp_path, system, name='odd', **change)
    for other in ('singleadv', 'doubleadv'):
        write(tmp_path, other)
    found = collected(tmp_path)
    assert found.apart == [('odd', reason)]
    assert names(found) == ['singleadv0', 'doubleadv0']


def test_results_on_other_places_are_apart(tmp_path):
    chosen = LAST | {'clean': {'correct': 0.9, 'settings': {'indices': 64 * 'a'}}}
    write(tmp_path, 'baseline', evaluations={40: chosen})
    for other in ('singleadv', 'doubleadv'):
        write(tmp_path, other)
    assert only_reason(tmp_path) == f'clean with indices {64 * "a"}, not None'


def test_the_split_that_selects_is_told(tmp_path):
    changes = {'eval__select_on': 'validation', 'data__validation_examples': 100}
    write(tmp_path, 'baseline', evaluations={40: LAST | {'validation_ifgsm5': 0.5}}, **changes)
    write(tmp_path, 'singleadv')
    write(tmp_path, 'doubleadv')
    assert only_reason(tmp_path) == 'snapshots selected on: validation, not test'


def test_systems_may_combine_their_members_differently(tmp_path):
    write(tmp_path, 'singleadv')
    write(tmp_path, 'ensemble2adv', ensemble__combine='logits')
    assert not collected(tmp_path).apart


def test_accuracies_under_other_settings_select_nothing(tmp_path):
    weaker = LAST | {'ifgsm5': {'correct': 0.9, 'settings': {'step_size': 0.01}}}
    write(tmp_path, 'singleadv', evaluations={20: weaker, 40: LAST})
    (run,) = collected(tmp_path).runs
    assert run.best == 40


@pytest.mark.parametrize(
    'change, reason',
    [
        ({'model__width': 2}, 'another SingleAdv: with model.width 2, not 1'),
        ({'batch_norm__sync': True}, 'another SingleAdv: with batch_norm.sync True, not False'),
        (
            {'train__adversarial_weight': 2.0},
            'another SingleAdv: with train.adversarial_weight 2.0, not 1.0',
        ),
    ],
)
def test_the_seeds_of_a_system_are_trained_alike(tmp_path, change, reason):
    write(tmp_path, seed=0, **change)
    write(tmp_path, seed=1)
    write(tmp_path, seed=2)
    assert collected(tmp_path).apart == [('singleadv0', reason)]


def test_seeds_trained_for_other_numbers_of_steps(tmp_path):
    write(tmp_path, seed=0, train__steps=50, evaluations={50: LAST})
    write(tmp_path, seed=1)
    write(tmp_path, seed=2)
    assert only_reason(tmp_path) == 'another SingleAdv: with train.steps 50, not 40'


def test_seeds_trained_with_other_extra_images(tmp_path):
    mixed = {'data__extra_fraction': 0.7, 'data__cutmix': 1.0, 'data__cutout': 3}
    for seed, fingerprint in enumerate(('abcdefghij', 'abcdefghij', 'other')):
        extra = {'num': 20_000, 'fingerprint': fingerprint}
        write(tmp_path, seed=seed, dataset=DIGITS | {'extra': extra}, **mixed)
    collection = collected(tmp_path)
    reason = 'another SingleAdv: with data.extra other..., not abcdefgh...'
    assert collection.apart == [('singleadv2', reason)]
    told = '70 % of each batch from 20,000 extra images (fingerprint abcdefgh...)'
    assert basis.training(collection)[-1] == (
        f'SingleAdv: {told}, Cutout of 3 pixels, CutMix with Beta(1, 1).'
    )


def test_each_system_with_cutmix_says_so(tmp_path):
    for system, alpha in (('baseline', 0.0), ('singleadv', 1.0), ('ensemble2adv', 0.5)):
        write(tmp_path, system, data__cutmix=alpha)
    assert basis.training(collected(tmp_path))[-2:] == [
        'SingleAdv: CutMix with Beta(1, 1).',
        'Ensemble2Adv: CutMix with Beta(0.5, 0.5).',
    ]


def test_the_same_seed_twice(tmp_path):
    write(tmp_path, name='a')
    write(tmp_path, name='b')
    found = collected(tmp_path)
    assert names(found) == ['a']
    assert found.apart == [('b', 'SingleAdv with seed 0 is in the report already, as a')]


def test_sources_of_a_transfer_set_are_no_systems(tmp_path):
    source = write(tmp_path / 'blackbox', 'baseline', 1000)
    # As it was before the directory moved.
    report_runs.write_transfer_set(tmp_path / 'blackbox', ['elsewhere/baseline1000'])
    write(tmp_path, 'baseline')
    assert collected(tmp_path).apart == [('blackbox/baseline1000', 'a source of the transfer set')]
    (source.parent / 'blackbox.npz').write_bytes(b'damaged')
    assert only_reason(tmp_path) == (
        'perhaps a source of the transfer set beside it (blackbox.npz is damaged)'
    )


def damage(path, name: str, content: str) -> None:
    (path / name).write_text(content)


@pytest.mark.parametrize(
    'name, content, reason',
    [
        ('config.json', '{', 'config.json: not valid JSON'),
        ('config.json', '[' * 100_000, 'config.json: not valid JSON'),
        ('config.json', '{"config": {}}', 'not the config.json of a run (no config.system)'),
        ('eval/20.json', '{"attacks": [', '20.json: not valid JSON'),
        ('eval/20.json', '{"system": "SingleAdv"}', 'eval/20.json is not of a run (no seed)'),
        ('eval/20.json', '7', 'eval/20.json is not of a run (expected an object, found 7)'),
    ],
)
def test_a_damaged_run_is_apart_and_the_others_are_not(tmp_path, name, content, reason):
    write(tmp_path, 'baseline')
    damage(write(tmp_path, 'singleadv'), name, content)
    found = collected(tmp_path)
    assert names(found) == ['baseline0']
    assert reason in only_reason(tmp_path)


@pytest.mark.parametrize('content', ['{"architectures": ["Bert"]}', '[]', '{"config": 3}'])
def test_another_programs_config_json_hides_no_run_below_it(tmp_path, content):
    folder = tmp_path / 'downloads'
    write(folder, 'baseline')
    damage(folder, 'config.json', content)
    found = collected(tmp_path)
    assert names(found) == ['downloads/baseline0']
    assert not found.apart
    # Nor in the directory that is reported on.
    assert names(collected(folder)) == ['baseline0']


def test_a_damaged_config_json_hides_no_run_below_it(tmp_path):
    folder = tmp_path / 'study'
    write(folder, 'baseline')
    damage(folder, 'config.json', '{"config": {"sys')
    found = collected(tmp_path)
    assert names(found) == ['study/baseline0']
    ((name, reason),) = found.apart
    assert name == 'study'
    assert 'not valid JSON' in reason


def test_a_runs_own_config_json_ends_the_search(tmp_path):
    write(write(tmp_path, 'baseline') / 'backup', 'baseline')
    found = collected(tmp_path)
    assert names(found) == ['baseline0']
    assert not found.apart


def test_results_copied_from_another_run_are_no_results(tmp_path):
    other = write(tmp_path, 'baseline', 3)
    mine = write(tmp_path, 'singleadv', 0)
    (mine / 'eval' / '40.json').write_bytes((other / 'eval' / '40.json').read_bytes())
    assert only_reason(tmp_path) == 'eval/40.json is of another run: Baseline, seed 3, step 40'


@pytest.mark.parametrize('accuracy', [float('nan'), 1.5])
def test_what_is_no_accuracy_is_not_averaged(tmp_path, accuracy):
    bad = LAST | {'pgd20': {'correct': 0.5, 'accuracy': accuracy}}
    write(tmp_path, evaluations={20: bad, 40: LAST})
    assert only_reason(tmp_path) == f'eval/20.json: pgd20 with accuracy {accuracy}'


def test_runs_are_found_in_any_depth_and_in_the_directory_itself(tmp_path):
    path = write(tmp_path / 'a b' / 'c', name='run 0')
    (tmp_path / 'report').mkdir()
    (tmp_path / 'notes.txt').write_text('')
    assert names(collected(tmp_path)) == ['a b/c/run 0']
    assert names(collected(path)) == ['run 0']


@pytest.mark.parametrize('name', ['', 'nowhere', 'file'])
def test_no_run_is_a_mistake(tmp_path, name):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'found no run below it|no run is here'):
        collected(tmp_path / name)


def members(root, *seeds: int, **changes) -> list:
    return [write(root / 'members', seed=seed, **changes) for seed in seeds]


def test_ensembles_of_runs_with_other_members_are_two_seeds(tmp_path):
    runs = members(tmp_path, 0, 1, 2, 3)
    write_ensemble(tmp_path / 'a', runs[:2], LAST)
    write_ensemble(tmp_path / 'b', runs[2:], LAST)
    found = collected(tmp_path)
    assert [run.seed for run in found.systems['Separate2Adv']] == ['0+1', '2+3']
    assert [run.steps for run in found.systems['Separate2Adv']] == [40, 40]
    assert not found.apart
    assert not found.notes


def test_members_in_another_order_are_the_same_ensemble(tmp_path):
    runs = members(tmp_path, 0, 1)
    write_ensemble(tmp_path / 'a', runs, LAST)
    write_ensemble(tmp_path / 'b', runs[::-1], LAST)
    assert only_reason(tmp_path) == 'Separate2Adv with seed 1+0 is in the report already, as a'


def test_ensembles_that_share_a_member_are_said_to(tmp_path):
    runs = members(tmp_path, 0, 1, 2)
    write_ensemble(tmp_path / 'a', runs[:2], LAST)
    write_ensemble(tmp_path / 'b', runs[1:], LAST)
    (note,) = collected(tmp_path).notes
    assert note.startswith('Runs of Separate2Adv share members')


def test_ensembles_of_best_snapshots_of_any_step_are_seeds_and_are_said_to_be_selected(tmp_path):
    runs = members(tmp_path, 0, 1, 2, 3)
    best = {'ensemble__members_snapshot': 'best'}
    write_ensemble(tmp_path / 'a', runs[:2], LAST, steps=(10, 40), **best)
    write_ensemble(tmp_path / 'b', runs[2:], LAST, steps=(20, 30), **best)
    found = collected(tmp_path)
    assert [run.steps for run in found.systems['Separate2Adv']] == [40, 30]
    (note,) = found.notes
    assert 'best snapshots, selected on the test split' in note


def test_an_ensemble_of_runs_and_a_run_are_not_seeds_of_one_system(tmp_path):
    write(tmp_path, 'separate2adv', 0)
    write(tmp_path, 'separate2adv', 1)
    write_ensemble(tmp_path / 'a', members(tmp_path, 0, 1), LAST)
    assert only_reason(tmp_path).startswith('another Separate2Adv: with an ensemble of runs True')
    assert len(only_reason(tmp_path)) < 200


def test_systems_trained_differently_are_told(tmp_path):
    root = tmp_path / 'root'
    write(root, 'baseline', train__batch_size=16)
    write(root, 'singleadv')
    write(root, 'doubleadv', model__depth=16)
    write(root, 'ensemble2adv', train__steps=50, evaluations={50: LAST})
    # Of an ensemble of runs the members' training counts.
    write_ensemble(root / 'e', members(tmp_path, 4, 5, train__learning_rate=0.2), LAST)
    assert collected(root).notes == [
        'DoubleAdv was trained with model.depth 16, most others with 10.',
        'Baseline was trained with train.batch_size 16, most others with 8.',
        'Separate2Adv was trained with train.learning_rate 0.2, most others with 0.1.',
        'Ensemble2Adv was trained with train.steps 50, most others with 40.',
    ]


def test_runs_made_with_other_switches_of_xla_and_jax_are_told(tmp_path):
    sessions = {
        'baseline': {'xla_flags': '--xla_dump_to=/tmp/y'},
        'singleadv': {'xla_flags': '--xla_b --xla_a --xla_dump_to=/tmp/x'},
        'doubleadv': {'xla_flags': ''},
    }
    for system, session in sessions.items():
        write_run(tmp_path / system, run_config(system), {40: LAST}, session=session)
    switch = {'correct': 0.5, 'switches': {'JAX_OPTIMIZATION_LEVEL': 'O1'}}
    write(tmp_path, 'ensemble2adv', evaluations={40: LAST | {'pgd20': switch}})
    assert collected(tmp_path).notes == [
        'singleadv was trained with XLA_FLAGS=--xla_a --xla_b, most others with no switch set. '
        'Its numbers differ at least by rounding.',
        'ensemble2adv0 was evaluated with JAX_OPTIMIZATION_LEVEL=O1, most others with no switch '
        'set. Its numbers differ at least by rounding.',
    ]


def test_evaluations_with_other_settings_than_the_last_are_left_out_of_series(tmp_path):
    old = {'clean': 0.9, 'ifgsm5': 0.6, 'pgd20': {'correct': 0.9, 'settings': {'restarts': 2}}}
    write(tmp_path, evaluations={10: old, 20: old, 30: LAST | {'ifgsm5': 0.7}, 40: LAST})
    found = collected(tmp_path)
    steps, values = found.runs[0].series('pgd20')
    np.testing.assert_array_equal(steps, [30, 40])
    np.testing.assert_array_equal(values, [0.5, 0.5])
    assert found.notes == [
        'singleadv0: 2 of 4 evaluations of pgd20 were made with other settings than the last one. '
        'Averages over training leave them out.'
    ]


def test_the_best_step_is_the_earliest_of_the_best(tmp_path):
    def outcomes(accuracy):
        return {**LAST, 'ifgsm5': accuracy}

    write(tmp_path, evaluations={10: outcomes(0.5), 20: outcomes(0.7), 30: outcomes(0.7),
                                 40: outcomes(0.6)})  # fmt: skip
    (run,) = collected(tmp_path).runs
    assert (run.judge, run.best) == ('ifgsm5', 20)


def test_member_is_what_runs_describe_says(tmp_path):
    from ensadv.evaluation import finished_runs
    from ensadv.storage import workdir

    config = run_config(seed=3)
    path = epath.Path(write(tmp_path, seed=3))
    found = finished_runs.Run(path, config, workdir.read_record(path), 40).describe()
    assert found == member(path)
