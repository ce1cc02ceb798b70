"""The training loop: what it computes, what it writes, and that it goes on as if never stopped."""

import json
import os
import pathlib
import signal

import jax
import numpy as np
import pytest
from conftest import (
    empty_files,
    snapshot_bytes,
    tensorboard_values,
    tiny_config,
    variables_like,
)
from etils import epath

from ensadv import build
from ensadv.data import datasets
from ensadv.data import extra as extra_data
from ensadv.errors import ConfigError, TrainingError, UserError
from ensadv.runtime import stopping
from ensadv.storage import checkpoints, files, leases
from ensadv.storage import workdir as workdir_lib
from ensadv.training import pace, streams, train

pytestmark = pytest.mark.usefixtures('small_network')


def snapshot(config, path, step):
    return checkpoints.open_snapshots(path).restore(step, variables_like(config))


def test_writes_what_the_design_says(workdir):
    config = tiny_config('ensemble2adv')
    calls = []
    train.run(config, workdir, on_snapshot=lambda: calls.append(1))
    assert checkpoints.open_checkpoints(workdir, 3).steps() == [2, 4]
    assert checkpoints.open_snapshots(workdir).steps() == [2, 4]
    assert len(calls) == 3  # after each snapshot, and at the end
    record = json.loads((workdir / 'config.json').read_text())
    assert record['config']['ensemble']['size'] == 2
    assert record['dataset']['num_test'] == 360
    assert record['parameters'] == sum(
        leaf.size for leaf in jax.tree.leaves(snapshot(config, workdir, 4)['params'])
    )
    assert [session['step'] for session in record['sessions']] == [0]
    assert record['sessions'][0]['versions']['jax'] == jax.__version__
    assert record['sessions'][0]['xla_flags'] == os.environ['XLA_FLAGS']
    # The report sets these against robustness; the first interval, which compiles, does not count.
    assert 0 < record['sessions'][0]['seconds_per_step'] < 1
    operations = record['operations']
    assert operations['train_step'] == 2 * operations['attack_step'] + 2 * operations['update']
    assert any(path.name.startswith('events.') for path in workdir.iterdir())
    assert not [path for path in pathlib.Path(workdir).rglob('*') if 'tmp' in path.name]
    for leaf in jax.tree.leaves(snapshot(config, workdir, 4)):
        assert leaf.shape[0] == 2
        assert np.all(np.isfinite(leaf))


def test_scalars_reach_tensorboard(workdir):
    train.run(tiny_config('singleadv'), workdir)
    values = {tag: dict(pairs) for tag, pairs in tensorboard_values(workdir).items()}
    losses = {'loss', 'clean_loss', 'adversarial_loss', 'gradient_norm'}
    accuracies = {'clean_accuracy', 'adversarial_accuracy'}
    for tag in losses | accuracies | {'learning_rate', 'examples_per_second'}:
        assert set(values[tag]) == {2, 4}, tag
    # The rate of the last update of each interval: the fourth, number 3, is the first reduced one.
    np.testing.assert_allclose([values['learning_rate'][s] for s in (2, 4)], [0.1, 0.02], rtol=1e-5)
    np.testing.assert_allclose(
        values['loss'][4], (values['clean_loss'][4] + values['adversarial_loss'][4]) / 2, rtol=1e-5
    )


def extra_images(folder):
    """Writes a file of images that look like digits, and returns what trains on it."""
    digits = datasets.load('digits')
    path = pathlib.Path(folder) / 'extra.npz'
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, image=255 - digits.image_train[:50], label=digits.label_train[:50])
    return path, {'data__extra': (str(path),), 'data__extra_fraction': 0.4}


def test_going_on_gives_the_same_bits(workdir):
    """Whether examples are on the device or streamed from the host, whatever they are mixed of."""
    _, extra = extra_images(workdir.parent)
    recipe = {
        'train__objective': 'trades', 'train__label_smoothing': 0.1, 'train__awp_gamma': 0.01,
        'train__awp_start': 3, 'train__warmup_steps': 2, 'train__weight_decay_on': 'kernels',
        'data__cutmix': 1.0, 'data__cutout': 2,
    } | extra  # fmt: skip
    config = tiny_config('ensemble2adv', train__snapshot_every=100, **recipe)
    train.run(config, workdir / 'whole')
    config.train.steps = 2
    config.data.on_device = 'no'
    train.run(config, workdir / 'parts')
    config.train.steps = 4
    train.run(config, workdir / 'parts')
    record = workdir_lib.read_record(workdir / 'parts')
    assert record['dataset']['extra']['num'] == 50
    whole, parts = (snapshot_bytes(config, workdir / name, 4) for name in ('whole', 'parts'))
    assert whole == parts
    # The attack's target is a prediction, and one step of four has its passes twice.
    operations = json.loads((workdir / 'parts' / 'config.json').read_text())['operations']
    attack = operations['forward'] + 2 * operations['attack_step']
    assert operations['train_step'] == attack + 2.5 * operations['update']


def test_calls_of_any_length_give_the_same_bits(workdir):
    """The chunks of the compiled loop are a matter of speed."""
    results = []
    for steps_per_call in (1, 3):
        # What is drawn for a step, as DVERGE's layer is, depends on its number alone.
        recipe = {'train__diversity': 'dverge', 'train__dverge_start': 1}
        config = tiny_config('ensemble2adv', train__steps_per_call=steps_per_call, **recipe)
        config.train.log_every = 4
        config.train.checkpoint_every = config.train.snapshot_every = 4
        train.run(config, workdir / str(steps_per_call))
        results.append(snapshot_bytes(config, workdir / str(steps_per_call), 4))
    assert results[0] == results[1]


def test_a_signal_while_a_snapshot_is_evaluated(workdir, monkeypatch):
    """It need not be waited for: what training needs is on disk before."""
    config = tiny_config('singleadv', train__checkpoint_every=100)

    def interrupted():
        monkeypatch.setattr(stopping, '_requested', signal.SIGTERM)
        raise stopping.Stopped(signal.SIGTERM)

    with pytest.raises(stopping.Stopped):
        train.run(config, workdir, on_snapshot=interrupted)
    assert checkpoints.open_checkpoints(workdir, 3).steps() == [2]
    assert checkpoints.open_snapshots(workdir).steps() == [2]
    monkeypatch.undo()
    train.run(config, workdir)
    train.run(config, workdir / 'whole')
    assert snapshot_bytes(config, workdir, 4) == snapshot_bytes(config, workdir / 'whole', 4)


def test_two_trainers_in_one_workdir(workdir):
    config = tiny_config('singleadv')
    other = leases.open_leases(workdir)
    assert other.take(train.LOCK)
    with pytest.raises(UserError, match=f'is being trained in by .* pid {os.getpid()}'):
        train.run(config, workdir)
    assert [path.name for path in workdir.iterdir()] == ['claims']
    other.close()
    train.run(config, workdir)
    assert not list((workdir / 'claims').iterdir())


def test_a_trainer_that_lost_its_workdir_writes_no_more(workdir, monkeypatch):
    """As after a laptop's sleep, when another machine has taken the run over."""
    config = tiny_config('singleadv')
    monkeypatch.setattr(leases.Leases, 'still_held', lambda self, name: False)
    with pytest.raises(TrainingError, match='another process trains here'):
        train.run(config, workdir)
    assert checkpoints.open_checkpoints(workdir, 3).steps() == []


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(workdir, caplog):
    config = tiny_config('singleadv')
    train.run(config, workdir / 'whole')
    config.train.steps = 3
    train.run(config, workdir / 'parts')
    config.train.steps = 4
    empty_files(workdir / 'parts' / 'checkpoints' / '3')
    train.run(config, workdir / 'parts')
    assert 'checkpoints/3: ' in caplog.text
    assert 'parts/checkpoints/2 instead' in caplog.text
    record = json.loads((workdir / 'parts' / 'config.json').read_text())
    assert [session['step'] for session in record['sessions']] == [0, 2]
    whole, parts = (snapshot_bytes(config, workdir / name, 4) for name in ('whole', 'parts'))
    assert whole == parts


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_checkpoints_that_are_all_damaged_are_no_new_start(workdir):
    config = tiny_config('singleadv', train__steps=2)
    train.run(config, workdir)
    config.train.steps = 4
    empty_files(workdir / 'checkpoints' / '2')
    record = (workdir / 'config.json').read_bytes()
    with pytest.raises(TrainingError, match=r'no step in .* can be read'):
        train.run(config, workdir)
    assert (workdir / 'config.json').read_bytes() == record


def test_the_last_snapshot_is_made_again_from_its_checkpoint(workdir):
    config = tiny_config('singleadv')
    train.run(config, workdir)
    before = snapshot_bytes(config, workdir, 4)
    (workdir / 'snapshots' / '4').rmtree()
    calls = []
    train.run(config, workdir, on_snapshot=lambda: calls.append(1))
    assert snapshot_bytes(config, workdir, 4) == before
    assert len(calls) == 2


def test_a_finished_run_is_left_alone(workdir, monkeypatch):
    config = tiny_config('baseline')
    train.run(config, workdir)
    before = {str(path): path.stat().st_mtime for path in pathlib.Path(workdir).rglob('*')}
    # Its data are not even needed.
    monkeypatch.setattr(build, 'dataset', None)
    train.run(config, workdir)
    assert {str(p): p.stat().st_mtime for p in pathlib.Path(workdir).rglob('*')} == before


def test_separate_training_equals_single_runs(workdir):
    """Member i of Separate2Adv with seed s is SingleAdv with seed 2s + i."""
    # Each by its own gradient and norms, where weights are perturbed.
    recipe = {'train__objective': 'trades', 'train__awp_gamma': 0.01, 'train__schedule': 'cosine'}
    changes = {'train__steps': 3, 'train__snapshot_every': 3, **recipe}
    separate = tiny_config('separate2adv', seed=3, **changes)
    train.run(separate, workdir / 'separate')
    both = snapshot(separate, workdir / 'separate', 3)
    members = []
    for seed in (6, 7):
        single = tiny_config('singleadv', seed=seed, **changes)
        train.run(single, workdir / f'single{seed}')
        members.append(snapshot(single, workdir / f'single{seed}', 3))
    for i, alone in enumerate(members):
        for ours, expected in zip(*map(jax.tree.leaves, (both, alone)), strict=True):
            np.testing.assert_allclose(ours[i], expected[0], rtol=1e-3, atol=1e-4)
    kernels = [member['params']['conv']['kernel'] for member in members]
    assert np.max(np.abs(kernels[0] - kernels[1])) > 0.01


def test_seeds_differ_in_everything():
    keys = [
        jax.random.key_data(jax.tree.leaves(streams.run_keys(seed))[i])
        for seed in (0, 1)
        for i in range(4)
    ]
    assert len({tuple(np.ravel(key)) for key in keys}) == 8
    separate = [tiny_config('separate2adv', seed=seed) for seed in (0, 1)]
    seeds = np.concatenate(
        [jax.random.key_data(streams.learner_keys(config).init) for config in separate]
    )
    assert len({tuple(key) for key in seeds}) == 4


def test_a_checkpoint_survives_the_reuse_of_its_memory(tmp_path):
    """Saving goes on in the background while the next step overwrites the state."""
    import jax.numpy as jnp

    saved = checkpoints.Checkpoints(epath.Path(tmp_path) / 'c', keep=3)
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    for step in range(1, 4):
        x = jnp.full((2_000_000,), float(step))
        saved.save(step, {'x': x})
        overwrite(x).block_until_ready()
    saved.close()
    for step in range(1, 4):
        assert np.all(saved.restore(step, {'x': jnp.zeros(2_000_000)})['x'] == step)


def test_stops_on_a_loss_that_is_not_finite(workdir):
    config = tiny_config('baseline', train__learning_rate=1e30, train__steps=20)
    with pytest.raises(TrainingError, match=r'not finite between steps \d+ and \d+'):
        train.run(config, workdir)
    for step in checkpoints.open_checkpoints(workdir, 3).steps():
        assert step < 20
    for step in checkpoints.open_snapshots(workdir).steps():
        for leaf in jax.tree.leaves(snapshot(config, workdir, step)):
            assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize(
    'fields, told',
    [
        ({'train.batch_size': 2000}, 'at most the 1437 training examples'),
        ({'data.pad': 8}, "less than the images' 8 pixels"),
        ({'data.cutout': 9}, "at most the images' 8 pixels"),
    ],
)
def test_what_the_data_do_not_allow_is_refused(workdir, fields, told):
    config = tiny_config('singleadv')
    config.update_from_flattened_dict(fields)
    with pytest.raises(ConfigError, match=told):
        train.run(config, workdir)
    assert not workdir.exists()


def test_a_workdir_belongs_to_its_run(workdir):
    train.run(tiny_config('baseline'), workdir)
    with pytest.raises(ConfigError, match=r'seed: 0 -> 1; train\.momentum: 0\.9 -> 0\.8'):
        train.run(tiny_config('baseline', seed=1, train__momentum=0.8), workdir)
    train.run(tiny_config('baseline', train__steps=5, train__log_every=1), workdir)
    assert checkpoints.open_snapshots(workdir).steps()[-1] == 5


@pytest.mark.parametrize(
    'fraction, told', [(0.01, r'from 1 to 7 .* in a batch of 8, found 0'), (0.99, 'found 8')]
)
def test_a_batch_has_examples_of_each_kind(workdir, fraction, told):
    _, extra = extra_images(workdir.parent)
    with pytest.raises(ConfigError, match=told):
        train.run(tiny_config(**extra | {'data__extra_fraction': fraction}), workdir)
    assert not workdir.exists()


def test_other_data_in_the_same_workdir_are_refused(workdir):
    path, extra = extra_images(workdir.parent)
    config = tiny_config('baseline', **extra)
    train.run(config, workdir)
    moved = path.rename(path.parent / 'moved.npz')
    arrays = dict(np.load(moved))
    arrays['label'][7] += 1
    np.savez(path, **arrays)
    extra_data.load.cache_clear()
    with pytest.raises(UserError, match=r'with other extra images than data\.extra names now'):
        train.run(tiny_config('baseline', train__steps=6, **extra), workdir)
    config.data.extra = (str(moved),)
    record = workdir_lib.read_record(workdir)
    record['dataset']['fingerprint'] = 'another'
    files.write_json(workdir / 'config.json', record)
    config.train.steps = 6
    with pytest.raises(UserError, match='fingerprint'):
        train.run(config, workdir)


@pytest.mark.parametrize(
    'step, expected', [(0, 10), (10, 20), (90, 97), (97, 100), (100, 110), (200, 203)]
)
def test_calls_stop_where_something_is_due(step, expected):
    fields = {'steps': 203, 'log_every': 50, 'checkpoint_every': 100,
              'snapshot_every': 150, 'profile_step': 97}  # fmt: skip
    config = tiny_config('baseline', **{f'train__{k}': v for k, v in fields.items()})
    assert pace.next_stop(step, config, 10) == expected


def test_a_profile_is_written_when_asked_for(workdir):
    config = tiny_config(
        'baseline', train__profile_step=2, train__profile_steps=1, train__steps_per_call=1
    )
    train.run(config, workdir)
    assert list(pathlib.Path(workdir).rglob('*.xplane.pb'))


def test_the_rate_leaves_the_compilation_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pace.time, 'monotonic', lambda: now[0])
    sums = {'loss': np.float32(3)}
    interval = pace.Interval(0)
    now[0] = 60.0
    interval.add(1, sums, compiled=True)
    assert interval.means(1, batch_size=8) == {'loss': 3}  # nothing was timed
    now[0] = 62.0
    interval.add(3, sums, compiled=False)
    assert interval.means(3, batch_size=8) == {'loss': 2, 'examples_per_second': 8}


def test_calls_are_short_enough_for_a_signal():
    length = pace.CallLength(steps_per_call=10)
    assert length.most == 1
    assert length.compiles
    length.add(1, 60.0)
    assert not length.compiles
    assert length.most == 1
    length.add(1, pace.CALL_SECONDS / 4)
    assert length.most == 4
    length.add(4, 0.1)
    assert length.most == 10
    length.add(10, 100 * pace.CALL_SECONDS)
    assert length.most == 1
