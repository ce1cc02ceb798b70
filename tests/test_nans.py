"""NaN and infinity: training stops before it saves them, and debug.nans finds where they begin.

Trouble is planted in a known place of a small network; the weights' explosion is a matter of the
learning rate, and so of a known step.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY, overrides, run_main, tiny_config
from small_network import wide_resnet

from ensadv import build, config_checks
from ensadv import config as config_lib
from ensadv.architectures import ARCHITECTURES
from ensadv.errors import ConfigError, TrainingError
from ensadv.models import ensemble
from ensadv.models.base import ImageNetwork
from ensadv.runtime import distributed
from ensadv.storage import checkpoints
from ensadv.training import feeds, nans, streams, train


@jax.custom_vjp
def broken_backward(x, flag):
    """Returns x; its gradient is NaN where the flag is set."""
    del flag
    return x


broken_backward.defvjp(
    lambda x, flag: (x, flag), lambda flag, g: (jnp.where(flag > 0, jnp.nan, g), jnp.zeros(()))
)


class Backward(nn.Module):
    """Passes on its input, and NaN backward if its flag is planted."""

    @nn.compact
    def __call__(self, x):
        return broken_backward(x, self.param('flag', nn.initializers.zeros, ()))


class Trap(nn.Module):
    """Passes on its input, but NaN for images that an attack has moved, if its flag is planted."""

    @nn.compact
    def __call__(self, x):
        flag = self.param('flag', nn.initializers.zeros, ())
        moved = jnp.max(jnp.abs(255 * x - jnp.round(255 * x))) > 0.01
        return jnp.where(moved & (flag > 0), jnp.nan, x)


class Small(ImageNetwork):
    @nn.compact
    def __call__(self, x, train):
        x = self.standardise(Trap(name='trap')(x))
        x = self.convolution()(4, (3, 3), padding=1, name='first')(x)
        x = nn.relu(self.norm(train)(name='norm')(x))
        x = Backward(name='backward')(x)
        return self.linear()(jnp.mean(x, axis=(1, 2)))


@pytest.fixture
def small(monkeypatch):
    """Every network is a small one, in which trouble can be planted."""
    monkeypatch.setitem(ARCHITECTURES, 'wide_resnet', wide_resnet(Small))


def planted(state, leaf, member, value):
    """Returns the state with a member's weight replaced, as in 'first/kernel'; None: all's."""
    *layer, name = leaf.split('/')
    params = jax.tree.map(lambda leaf: leaf, state.params)
    inside = params
    for part in layer:
        inside = inside[part]
    inside[name] = inside[name].at[slice(None) if member is None else member].set(value)
    return state.replace(params=params)


def finder(config):
    """Returns a run's first state, and what finds the place in a step from it."""
    config = build.resolve(config)
    dataset = build.dataset(config)
    model = build.model(config, dataset.describe(), dtype='float32')
    keys = streams.learner_keys(config)
    state = jax.jit(partial(train.init_state, config, model, dataset.image_shape))(keys)
    sampling = streams.sampling(config, dataset.describe())
    feed = feeds.open_feed(config, sampling, keys, dataset, None)
    state, keys = distributed.replicate((state, keys))
    draw = partial(feeds.draw, sampling)
    return state, nans.Finder(config, dataset, draw, feed.take, keys).find


@pytest.fixture(scope='module')
def small_ensemble():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, 'wide_resnet', wide_resnet(Small))
        config = tiny_config('ensemble2adv', attack__start='none', data__on_device='no')
        return finder(config)


EXTREME_LOGITS = np.array([3e38] + [-3e38] * 9, np.float32)


@pytest.mark.parametrize(
    'leaf, member, value, expected',
    [
        (
            'first/kernel', 1, np.nan,
            'the weights and running averages, member 1, first, its kernel: '
            '36 NaN and 0 infinite of 36 values',
        ),
        ('first/kernel', 0, 1e38, 'clean forward pass, member 0, first, its output: '),
        # Where the mean overflows too, the variance is NaN and so is the output.
        ('first/kernel', 1, 1e20, 'clean forward pass, member 1, norm, its '),
        (
            'linear/bias', None, EXTREME_LOGITS,
            'clean forward pass, the log-probabilities: 0 NaN and 72 infinite of 80 values',
        ),
        # Images that are not moved, and then those that one step has moved.
        (
            'trap/flag', 1, 1.0,
            'attack step 2 of 2, forward pass, member 1, trap, its output: '
            '512 NaN and 0 infinite of 512 values',
        ),
        (
            'backward/flag', 1, 1.0,
            # Nearest to the loss of what has a gradient, and is before the fault.
            'attack step 1 of 2, backward pass, member 1, norm, the gradient of its bias: '
            '4 NaN and 0 infinite of 4 values',
        ),
        # Squares of 1e25 are no float32 numbers, and neither is the norm of such a gradient.
        ('norm/bias', None, 1e25, 'update, the gradient_norm: 0 NaN and 1 infinite of 1 values'),
    ],
)  # fmt: skip
def test_finds_what_is_planted(small_ensemble, leaf, member, value, expected):
    state, find = small_ensemble
    found = find(planted(state, leaf, member, value))
    assert found.startswith(expected), found


def test_a_step_that_is_finite_has_no_such_place(small_ensemble):
    state, find = small_ensemble
    assert find(state) is None


def test_finds_what_other_objectives_do_besides(small):
    """A prediction by running averages for the attack; passes at weights that are perturbed."""
    recipe = {'train__objective': 'trades', 'train__awp_gamma': 1e38}
    state, find = finder(tiny_config('ensemble2adv', **recipe))
    assert find(state).startswith(
        'clean forward pass at perturbed weights, members 0 and 1, first, its output: '
    )
    stats = jax.tree.map(lambda leaf: leaf, state.batch_stats)
    stats['norm']['mean'] = stats['norm']['mean'].at[1].set(-3e38)  # its outputs' sum is infinite
    assert find(state.replace(batch_stats=stats)).startswith(
        "forward pass of the attack's target, member 1, linear, its output: "
    )


@pytest.mark.parametrize('member', [0, 1])
def test_finds_the_member_that_is_trained_by_itself(small, member):
    state, find = finder(
        tiny_config('separate2adv', train__adversarial_weight=0.0, attack__start='none')
    )
    found = find(planted(state, 'backward/flag', member, 1.0))
    assert found.startswith(f'backward pass, member {member}, norm, the gradient of its bias: ')


@pytest.mark.parametrize(
    'changes, first, last',
    [
        (
            {'model__name': 'wide_resnet'},
            ['conv_0', 'group_1_block_1/norm_1', 'group_1_block_1/conv_1',
             'group_1_block_1/norm_2', 'group_1_block_1/conv_2', 'group_1_block_1',
             'group_2_block_1/norm_1', 'group_2_block_1/shortcut', 'group_2_block_1/conv_1'],
            ['linear', '', ''],
        ),
        (
            {'model__name': 'vgg', 'model__depth': 11},
            ['conv_1_1', 'norm_1_1', 'conv_2_1', 'norm_2_1'],
            ['linear', '', ''],
        ),
        (
            {'ensemble__combine': 'gating', 'ensemble__gate_width': 2},
            ['member/conv_0', 'member/group_1_block_1/norm_1'],
            ['gate/conv_1', 'gate/conv_2', 'gate/linear', 'gate', '', ''],
        ),
    ],
)  # fmt: skip
def test_layers_come_in_the_order_of_computation(changes, first, last):
    config = tiny_config('ensemble2adv', **changes)
    dataset = build.dataset(config)
    model = build.model(config, dataset.describe(), dtype='float32')
    variables = jax.eval_shape(
        lambda: ensemble.init(model, jax.random.key(0), 2, dataset.image_shape)
    )
    count = partial(nans.count_in_layers, model, combine=config.ensemble.combine, train=True)
    x = jnp.zeros((8, *dataset.image_shape))
    counts = jax.eval_shape(lambda variables: count(variables, x), variables)
    layers = [layer for layer, what in counts if 'running' not in what]
    assert layers[: len(first)] == first
    assert layers[-len(last) :] == last
    kinds = [what for layer, what in counts if 'norm_1' in layer][:3]
    assert kinds == ['its output', 'its running mean', 'its running var']


# Finding the step.


def a_run(bad, broken='metrics'):
    """Returns an `advance` whose step from `bad` gives metrics or weights that are not finite."""

    def advance(state, num_steps):
        assert num_steps == 1
        values = {'metrics': 1.0, 'weights': 1.0}
        if bad is not None and state['step'] == bad:
            values[broken] = np.inf if broken == 'metrics' else np.nan
        weights = state['weights'].at[0].add(values['weights'])
        state = {'step': state['step'] + 1, 'weights': weights}
        return state, {'loss': jnp.float32(values['metrics'])}

    return advance


@pytest.mark.parametrize('broken', ['metrics', 'weights'])
def test_replay_stops_before_the_first_bad_step(broken):
    state = {'step': jnp.int32(3), 'weights': jnp.zeros(2)}
    step, before = nans.replay(state, a_run(7, broken), 3, 20)
    assert step == 7
    assert (before['step'], list(before['weights'])) == (7, [4, 0])
    assert nans.replay(state, a_run(7, broken), 3, 7) is None
    state['weights'] = state['weights'].at[1].set(np.inf)
    assert nans.replay(state, a_run(7, broken), 3, 20)[0] == 3


# Whole runs.

# At the update from step 3 to 4 the rate goes from 0.1 to 1e16. The weights are nearly that large
# then, and finite; the running averages are still those of the old ones.
EXPLODES = {
    'train__steps': 8,
    'train__learning_rate_factor': 1e17,
    'train__log_every': 1,
    'train__learning_rate_steps': (3,),
    'train__snapshot_every': 100,
}


def test_the_layer_is_found_when_the_run_goes_on(workdir, monkeypatch, small):
    logged = []
    monkeypatch.setattr(nans.logging, 'warning', lambda text, *args: logged.append(text % args))
    config = tiny_config('ensemble2adv', **EXPLODES)
    with pytest.raises(TrainingError, match='not finite between steps 4 and 5') as stopped:
        train.run(config, workdir)
    advice = '--config.debug.nans=True goes on from the checkpoint of step 4 and finds the layer'
    assert advice in str(stopped.value)
    assert 'A lower train.learning_rate helps' in str(stopped.value)
    assert not logged
    config.debug.nans = True
    with pytest.raises(TrainingError) as found:
        train.run(config, workdir)
    told = str(found.value)
    assert told.startswith('the step from 4 to 5 is the first that is not finite. ')
    assert told.endswith(nans.ADVICE)
    assert '\n' not in told
    assert len(told) < 500
    assert 'from the checkpoint of step 4' in logged[0]

    # The same by hand, with flax's own means: the members' layers with the weights of step 4.
    dataset = build.dataset(config)
    model = build.model(config, dataset.describe(), dtype='float32')
    like = jax.eval_shape(
        lambda: train.init_state(config, model, dataset.image_shape, streams.learner_keys(config))
    )
    state = checkpoints.open_checkpoints(workdir, 3).restore(4, like)
    x = jnp.asarray(dataset.image_train[:8], jnp.float32) / 255

    @jax.jit
    def captured(params, batch_stats):
        own = {'params': params, 'batch_stats': batch_stats}
        apply = partial(model.apply, own, x, train=False, mutable=['intermediates'])
        return apply(capture_intermediates=True)[1]['intermediates']

    for member in (0, 1):
        own = jax.tree.map(lambda leaf, i=member: leaf[i], (state.params, state.batch_stats))
        outputs = captured(*own)
        finite = {
            layer: bool(np.isfinite(outputs[layer]['__call__'][0]).all())
            for layer in ('trap', 'first', 'norm', 'backward', 'linear')
        }
        assert [layer for layer, fine in finite.items() if not fine] == ['linear']
    assert 'attack step 1 of 2, forward pass, members 0 and 1, linear, its output: ' in told
    largest = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(state.params))
    assert f'. The weights before: norm {optax.tree.norm(state.params):.2g}, largest ' in told
    assert f', largest {largest:.2g} in ' in told
    table = [line.split(maxsplit=3) for line in logged[1].splitlines()]
    assert ' '.join(table[0]) == (
        'largest finite values in this step, attack step 1 of 2, forward pass:'
    )
    assert table[1] == ['largest', 'NaN', 'infinite', 'where']
    found = {where: (largest, bad) for largest, nan, bad, where in table[2:]}
    own = jax.tree.map(lambda leaf: leaf[0], (state.params, state.batch_stats))
    norm = np.max(np.abs(captured(*own)['norm']['__call__'][0]))
    assert float(found['norm: its output'][0]) == pytest.approx(norm, rel=0.1)
    assert found['norm: its output'][1] == '0'
    assert int(found['linear: its output'][1]) > 0


def test_the_command_line_on_two_devices(tmp_path):
    """Statistics over both devices, and each device's share of the batch looked at there."""
    fields = TINY | {
        **{field.replace('__', '.'): value for field, value in EXPLODES.items()},
        'batch_norm.sync': True,
        'train.adversarial_weight': 0.0,
        'train.learning_rate_factor': 1e20,  # the squares are no float32 numbers then
        'debug.nans': True,
    }
    result = run_main(
        '--config=configs/singleadv.py', *overrides(fields), f'--workdir={tmp_path}/run',
        devices=2, small=True,
    )  # fmt: skip
    assert result.returncode == 1
    assert 'Traceback' not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith('error: the step from 4 to 5 is the first that is not finite. ')
    assert 'clean forward pass, member 0, norm, its running var: 0 NaN and ' in last
    assert ' of 32 values. ' in last  # 16 channels on either device


@pytest.mark.parametrize(
    'leaf, member, value, found',
    [
        (
            'first/kernel', 1, np.nan,
            'the state of step 0 itself is not finite: the weights and running averages, member 1',
        ),
        ('linear/bias', None, EXTREME_LOGITS, 'forward pass, the log-probabilities: 0 NaN and'),
    ],
)  # fmt: skip
def test_nothing_that_is_not_finite_is_saved(
    workdir, monkeypatch, small, leaf, member, value, found
):
    """NaN in one member of two; a loss that is infinite, though no weight is."""
    init_state = train.init_state
    monkeypatch.setattr(
        train, 'init_state', lambda *args: planted(init_state(*args), leaf, member, value)
    )
    config = tiny_config('ensemble2', train__steps=2, train__log_every=1, debug__nans=True)
    config.train.checkpoint_every = config.train.snapshot_every = 1
    with pytest.raises(TrainingError) as stopped:
        train.run(config, workdir)
    assert found in str(stopped.value)
    assert checkpoints.open_checkpoints(workdir, 3).steps() == []
    assert checkpoints.open_snapshots(workdir).steps() == []


def test_a_weight_that_is_not_finite_stops_training_although_the_loss_is(
    workdir, monkeypatch, small
):
    """The loss of the only step is that of the weights before it. Features of 1e5 make a gradient
    of about as much, which times the rate is no float32 number."""
    init_state = train.init_state
    monkeypatch.setattr(
        train, 'init_state', lambda *args: planted(init_state(*args), 'norm/bias', None, 1e5)
    )
    config = tiny_config('ensemble2', train__steps=1, train__learning_rate=1e38)
    config.debug.nans = True
    found = 'from 0 to 1 is the first .* update, members 0 and 1, linear, its new kernel: '
    with pytest.raises(TrainingError, match=found):
        train.run(config, workdir)
    assert checkpoints.open_checkpoints(workdir, 3).steps() == []
    assert checkpoints.open_snapshots(workdir).steps() == []


# Of one output channel of four.
LARGE = np.float32([5e18, 0, 0, 0])


def test_an_infinite_running_variance_is_not_saved_although_loss_and_weights_are_finite(
    workdir, monkeypatch, small
):
    """The sum of nine squared weights is a float32 number, the squares of their outputs are not."""
    init_state = train.init_state
    monkeypatch.setattr(
        train, 'init_state', lambda *args: planted(init_state(*args), 'first/kernel', 1, LARGE)
    )
    config = tiny_config('ensemble2', train__steps=1, debug__nans=True)
    found = 'from 0 to 1 is the first .* member 1, norm, its running var: 0 NaN and 1 infinite of 4'
    with pytest.raises(TrainingError, match=found):
        train.run(config, workdir)
    assert checkpoints.open_checkpoints(workdir, 3).steps() == []
    assert checkpoints.open_snapshots(workdir).steps() == []


# What is said.


def test_a_run_whose_steps_are_finite_the_second_time_says_so():
    error = nans.NotFiniteError(4, 6)
    state = {'step': jnp.int32(4), 'weights': jnp.zeros(2)}
    told = nans.error_with_place(error, 4, state, a_run(None), None)
    assert 'from the checkpoint of step 4, all steps to 6 were finite' in str(told)
    state = {'step': jnp.int32(4), 'weights': jnp.zeros(2)}
    told = nans.error_with_place(error, 4, state, a_run(5), lambda state: None)
    assert str(told).startswith('the step from 5 to 6 is not finite, but computed once more')
    assert 'rounding decides' in str(told)
    assert 'the beginning' in str(nans.error_with_advice(error, 0))


def test_the_field_may_change_and_is_true_or_false():
    config = tiny_config('singleadv')
    old = config_lib.to_dict(config)
    config.debug.nans = True
    config_checks.validate(config)
    assert config_lib.changed_fields(old, config_lib.to_dict(config)) == []
    with config.ignore_type():
        config.debug.nans = 'yes'
    with pytest.raises(ConfigError, match=r"debug\.nans: expected True or False, found 'yes'"):
        config_checks.validate(config)
