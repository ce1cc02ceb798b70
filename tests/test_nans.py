"""NaN and infinity: training stops before it saves them, and debug.nans finds where they begin.

Trouble is planted in a known place of a small network; the weights' explosion is a matter of the
learning rate, and so of a known step.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, overrides, run_main, tiny_config

from ensadv import build, losses
from ensadv import config as config_lib
from ensadv.errors import ConfigError, TrainingError
from ensadv.models import ensemble
from ensadv.models.base import ImageNetwork
from ensadv.runtime import distributed
from ensadv.storage import checkpoints
from ensadv.training import inspection, nans, train
from ensadv.training.inspection import Place, Seen


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
    monkeypatch.setitem(build.MODELS, 'wide_resnet', Small)


def planted(state, leaf, member, value):
    """Returns the state with a member's weight replaced, as in 'first/kernel'; None: all's."""
    *layer, name = leaf.split('/')
    params = jax.tree.map(lambda leaf: leaf, state.params)
    inside = params
    for part in layer:
        inside = inside[part]
    inside[name] = inside[name].at[slice(None) if member is None else member].set(value)
    return state.replace(params=params)


def parts(config):
    """Returns a run's first state, and what looks at its layers."""
    config = build.resolve(config)
    dataset = build.dataset(config)
    model = build.model(config, dataset.describe(), dtype='float32')
    keys = train.learner_keys(config)
    state = jax.jit(partial(train.init_state, config, model, dataset.image_shape))(keys)
    arrays, state, keys = distributed.replicate(
        ((dataset.image_train, dataset.label_train), state, keys)
    )
    draw = partial(train.draw_batch, config)
    return state, nans.make_examine(config, dataset, draw, arrays, keys)


@pytest.fixture(scope='module')
def small_ensemble():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(build.MODELS, 'wide_resnet', Small)
        return parts(tiny_config('ensemble2adv', attack__start='none'))


EXTREME_LOGITS = np.array([3e38] + [-3e38] * 9, np.float32)


@pytest.mark.parametrize(
    'leaf, member, value, expected',
    [
        ('first/kernel', 1, np.nan, ('state', 1, 'first', 'its current kernel')),
        # Images that are not moved, and then those that one step has moved.
        ('first/kernel', 1, 1e38, ('attack step 1 of 2, forward pass', 1, 'first', 'its output')),
        ('trap/flag', 1, 1.0, ('attack step 2 of 2, forward pass', 1, 'trap', 'its output')),
        (
            'linear/bias', None, EXTREME_LOGITS,
            ('attack step 1 of 2, forward pass', None, '', 'the log-probabilities'),
        ),
        (
            'backward/flag', 1, 1.0,
            ('attack step 1 of 2, backward pass', 1, 'backward', 'the gradient of its input'),
        ),
        # Squares of 1e25 are no float32 numbers, and neither is the norm of such a gradient.
        ('norm/bias', None, 1e25, ('gradient', None, '', 'the norm of the gradient')),
    ],
)  # fmt: skip
def test_finds_what_is_planted(small_ensemble, leaf, member, value, expected):
    state, examine = small_ensemble
    rows = examine(planted(state, leaf, member, value))
    place = inspection.first_not_finite(rows)
    assert place == Place(*expected)
    assert all(seen.finite for other, seen in rows.items() if other.stage == 'state') or (
        place.stage == 'state'
    )


def test_statistics_that_overflow_are_found_where_they_are_taken(small_ensemble):
    state, examine = small_ensemble
    place = inspection.first_not_finite(examine(planted(state, 'first/kernel', 1, 1e20)))
    # Where the mean overflows too, the variance is NaN and so is the output.
    assert place[:3] == ('clean forward pass', 1, 'norm')
    assert place.what in ('its running var', 'its output')


def test_a_step_that_is_finite_is_seen_as_such(small_ensemble):
    state, examine = small_ensemble
    rows = examine(state)
    assert inspection.first_not_finite(rows) is None
    assert list(dict.fromkeys(place.stage for place in rows)) == [
        'state',
        'attack step 1 of 2, forward pass', 'attack step 1 of 2, backward pass',
        'attack step 2 of 2, forward pass', 'attack step 2 of 2, backward pass',
        'clean forward pass', 'adversarial forward pass',
        'backward pass of the clean loss', 'backward pass of the adversarial loss',
        'gradient', 'update',
    ]  # fmt: skip
    told = nans.explain(7, rows, state.params)
    assert told.startswith('the step from 7 to 8 is not finite, but computed once more')
    assert 'rounding decides' in told


@pytest.fixture(scope='module')
def separate():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(build.MODELS, 'wide_resnet', Small)
        return parts(
            tiny_config('separate2adv', train__adversarial_weight=0.0, attack__start='none')
        )


@pytest.mark.parametrize('member', [0, 1])
def test_finds_the_member_that_is_trained_by_itself(separate, member):
    state, examine = separate
    rows = examine(planted(state, 'backward/flag', member, 1.0))
    expected = 'backward pass of the clean loss', member, 'backward', 'the gradient of its input'
    assert inspection.first_not_finite(rows) == Place(*expected)


# What is seen, set against values made in another way.


def look(config, with_values=False):
    """Returns the passes of the training pass of a tiny network, and what they are made of."""
    dataset = build.dataset(config)
    model = build.model(config, dataset.describe(), dtype='float32')
    shape, k = dataset.image_shape, config.ensemble.size
    make = lambda: ensemble.init(model, jax.random.key(0), k, shape)
    variables = jax.jit(make)() if with_values else jax.eval_shape(make)
    x = jnp.asarray(dataset.image_train[:8], jnp.float32) / 255
    y = jnp.asarray(dataset.label_train[:8])
    passes = partial(
        inspection.look,
        model,
        loss_fn=lambda log_probs: jnp.mean(losses.cross_entropy(log_probs, y)),
        combine=config.ensemble.combine,
        train=True,
        weight=0.5,
    )
    return model, variables, x, y, passes


def test_rows_say_what_layers_and_gradients_are(small):
    model, variables, x, y, passes = look(tiny_config('singleadv'), with_values=True)
    found = jax.jit(lambda variables, x: passes(variables, x))(variables, x)

    def objective(params):
        own = jax.tree.map(lambda leaf: leaf[0], variables | {'params': params})
        logits, updated = model.apply(
            own, x, train=True, mutable=['batch_stats', 'intermediates'],
            capture_intermediates=True,
        )  # fmt: skip
        loss = jnp.mean(losses.cross_entropy(jax.nn.log_softmax(logits), y))
        return loss / 2, (logits, updated)

    differentiate = jax.jit(jax.grad(objective, has_aux=True))
    gradient, (logits, updated) = differentiate(variables['params'])

    def check(seen, array):
        np.testing.assert_allclose(seen.largest, np.max(np.abs(array)), rtol=1e-3, atol=1e-7)
        assert (seen.nan, seen.infinite, seen.size) == (0, 0, np.size(array))

    outputs = jax.tree_util.tree_leaves_with_path(updated['intermediates'])
    outputs = {
        '/'.join(key.key for key in path[:-2]): array
        for path, array in outputs
        if path[-2].key == '__call__'
    }
    places = {p.layer for p in found.forward if p.what == 'its output'}
    assert places == set(outputs)
    assert places == {'', 'trap', 'first', 'norm', 'backward', 'linear'}
    for layer, array in outputs.items():
        check(found.forward[Place('forward pass', 0, layer, 'its output')], array)
    averages = jax.tree_util.tree_leaves_with_path(updated['batch_stats'])
    for path, array in averages:
        *layer, name = (key.key for key in path)
        check(
            found.forward[Place('forward pass', 0, '/'.join(layer), f'its running {name}')], array
        )
    for path, array in jax.tree_util.tree_leaves_with_path(gradient):
        *layer, name = (key.key for key in path)
        what = f'the gradient of its {name}'
        check(found.backward[Place('backward pass', 0, '/'.join(layer), what)], array)
    of_logits = (jax.nn.softmax(logits) - jax.nn.one_hot(y, 10)) / len(y) / 2
    what = 'the gradient of its output'
    check(found.backward[Place('backward pass', 0, 'linear', what)], of_logits)
    of_features = of_logits @ variables['params']['linear']['kernel'][0].T
    what = 'the gradient of its input'
    check(found.backward[Place('backward pass', 0, 'linear', what)], of_features)


@pytest.mark.parametrize(
    'changes, forward',
    [
        (
            {'model__name': 'wide_resnet'},
            ['conv_0', 'group_1_block_1/norm_1', 'group_1_block_1/conv_1',
             'group_1_block_1/norm_2', 'group_1_block_1/conv_2', 'group_1_block_1',
             'group_2_block_1/norm_1', 'group_2_block_1/shortcut', 'group_2_block_1/conv_1'],
        ),
        (
            {'model__name': 'vgg', 'model__depth': 11, 'model__remat': True},
            ['conv_1_1', 'norm_1_1', 'conv_2_1', 'norm_2_1'],
        ),
        (
            {'ensemble__combine': 'gating', 'ensemble__gate_width': 2},
            ['member/conv_0', 'member/group_1_block_1/norm_1'],
        ),
    ],
)  # fmt: skip
def test_layers_come_in_the_order_of_computation(changes, forward):
    _, variables, x, _, passes = look(tiny_config('ensemble2adv', **changes))
    found = jax.eval_shape(lambda variables, x: passes(variables, x), variables, x)
    for member in (0, 1):
        outputs = [p for p in found.forward if p.member == member and p.what == 'its output']
        layers = [place.layer for place in outputs]
        assert layers[: len(forward)] == forward
        assert layers[-1] == ''
        backward = [
            place.layer
            for place in found.backward
            if place.member == member and place.what == 'the gradient of its output'
        ]
        assert backward == layers[::-1]
        if 'ensemble__combine' in changes:
            assert layers[-5:] == ['gate/conv_1', 'gate/conv_2', 'gate/linear', 'gate', '']
    weights = len(jax.tree.leaves(variables['params'])) * 2
    kinds = ('the gradient of its output', 'the gradient of its input')
    of_weights = [p for p in found.backward if p.member is not None and p.what not in kinds]
    assert len(of_weights) == weights
    assert list(found.backward)[:2] == [
        Place('backward pass', None, '', 'the gradient of the loss'),
        Place('backward pass', None, '', 'the gradient of the log-probabilities'),
    ]


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


def test_the_layer_is_found_when_the_run_goes_on_and_from_its_beginning(
    workdir, monkeypatch, small
):
    logged = []
    monkeypatch.setattr(nans.logging, 'warning', lambda text, *args: logged.append(text % args))
    config = tiny_config('ensemble2adv', **EXPLODES)
    with pytest.raises(TrainingError, match='not finite between steps 4 and 5') as stopped:
        train.run(config, workdir / 'a')
    advice = '--config.debug.nans=True goes on from the checkpoint of step 4 and finds the layer'
    assert advice in str(stopped.value)
    assert 'A lower train.learning_rate helps' in str(stopped.value)
    assert not logged
    config.debug.nans = True
    with pytest.raises(TrainingError) as found:
        train.run(config, workdir / 'a')
    told = str(found.value)
    assert told.startswith('the step from 4 to 5 is the first that is not finite. ')
    assert '\n' not in told
    assert len(told) < 500
    assert 'from the checkpoint of step 4' in logged[0]

    # The same by hand, with flax's own means: the members' layers with the weights of step 4.
    dataset = build.dataset(config)
    model = build.model(config, dataset.describe(), dtype='float32')
    like = jax.eval_shape(
        lambda: train.init_state(config, model, dataset.image_shape, train.learner_keys(config))
    )
    state = checkpoints.open_checkpoints(workdir / 'a', 3).restore(4, like)
    x = jnp.asarray(dataset.image_train[:8], jnp.float32) / 255

    @jax.jit
    def captured(params, batch_stats):
        own = {'params': params, 'batch_stats': batch_stats}
        apply = partial(model.apply, own, x, train=False, mutable=['intermediates'])
        return apply(capture_intermediates=True)[1]['intermediates']

    bad = set()
    for member in (0, 1):
        own = jax.tree.map(lambda leaf, i=member: leaf[i], (state.params, state.batch_stats))
        outputs = jax.tree_util.tree_leaves_with_path(captured(*own))
        bad |= {
            '/'.join(key.key for key in path[:-2])
            for path, array in outputs
            if path[-2].key == '__call__' and not np.isfinite(array).all()
        }
    order = [place.layer for place in nans_order(config)]
    first = next(layer for layer in order if layer in bad)
    assert first == 'linear'
    assert f'attack step 1 of 2, forward pass, members 0 and 1, {first}, its output: ' in told
    table = logged[1].splitlines()
    assert (
        table[0]
        == 'largest finite values in the step from 4 to 5, attack step 1 of 2, forward pass:'
    )
    assert any(line.endswith(f'{first}: its output') for line in table)

    # From the beginning, and noticed only at the end.
    config.train.log_every = config.train.checkpoint_every = 8
    config.train.steps_per_call = 8
    with pytest.raises(TrainingError) as again:
        train.run(config, workdir / 'b')
    assert str(again.value) == told
    assert 'between steps 0 and 8' in logged[2]
    assert 'from the beginning' in logged[2]
    assert checkpoints.open_checkpoints(workdir / 'b', 3).steps() == []


def nans_order(config):
    _, variables, x, _, passes = look(config)
    found = jax.eval_shape(lambda variables, x: passes(variables, x), variables, x)
    return [p for p in found.forward if p.member == 0 and p.what == 'its output']


def test_the_command_line_on_two_devices(tmp_path):
    """Statistics over both devices, and each device's share of the batch looked at there."""
    fields = TINY | {
        **{field.replace('__', '.'): value for field, value in EXPLODES.items()},
        'batch_norm.sync': True,
        'train.adversarial_weight': 0.0,
        'debug.nans': True,
    }
    result = run_main(
        '--config=configs/singleadv.py', *overrides(fields), f'--workdir={tmp_path}/run',
        devices=2,
    )  # fmt: skip
    assert result.returncode == 1
    assert 'Traceback' not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith('error: the step from 4 to 5 is the first that is not finite. ')
    assert 'clean forward pass, member 0, group_1_block_1/norm_2, its output: ' in last
    assert ' of 8,192 values; ' in last  # 8x8 pixels, 16 channels, the 8 images of both devices
    assert 'largest finite values in the step from 4 to 5, clean forward pass:' in result.stderr


@pytest.mark.parametrize(
    'leaf, member, value, found',
    [
        ('first/kernel', 1, np.nan, 'the state of step 0 itself is not finite: member 1, first'),
        ('linear/bias', None, EXTREME_LOGITS, 'forward pass, the log-probabilities: 0 NaN and'),
    ],
)
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
    found = r'from 0 to 1 .* update, members 0 and 1, linear, its new kernel: .* before it at most'
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


def test_the_message_names_everything(monkeypatch):
    logged = []
    monkeypatch.setattr(nans.logging, 'warning', lambda text, *args: logged.append(text % args))
    stage, good = 'clean forward pass', Seen(0, 0, 8, 2.0)
    rows = inspection.Rows()
    for member, bad in ((0, good), (1, Seen(3, 1000, 2048, 1e38)), (2, Seen(1, 0, 8, 0.0))):
        rows[Place(stage, member, '', 'its input')] = Seen(0, 0, 8, 1e3)
        rows[Place(stage, member, 'conv_0', 'its input')] = Seen(0, 0, 8, 30.0 + member)
        rows[Place(stage, member, 'conv_0', 'its output')] = bad
        rows[Place(stage, member, '', 'its output')] = bad
    params = {'conv_0': {'kernel': np.array([[1.0, 1.0], [3e30, -4e30], [1.0, 1.0]], np.float32)}}
    assert nans.explain(4, rows, params) == (
        'the step from 4 to 5 is the first that is not finite. clean forward pass, members 1 and '
        '2, conv_0, its output: 3 NaN and 1,000 infinite of 2,048 values; before it at most 31 in '
        'its input. The weights before: norm 5e+30, largest 4e+30 in conv_0/kernel. ' + nans.ADVICE
    )
    assert logged[0].splitlines() == [
        'largest finite values in the step from 4 to 5, clean forward pass:',
        'member   largest        NaN   infinite  where',
        '     1     1e+38          3      1,000  conv_0: its output',
        '     1     1e+38          3      1,000  the whole network: its output',
    ]


def test_a_run_whose_steps_are_finite_the_second_time_says_so():
    config = tiny_config('singleadv')
    error = nans.NotFiniteError(4, 6)
    state = {'step': jnp.int32(4), 'weights': jnp.zeros(2)}
    told = nans.explained(error, config, 4, state, a_run(None), None)
    assert 'from the checkpoint of step 4, all steps to 6 were finite' in str(told)
    assert 'the beginning' in str(nans.unexplained(error, 0))


def test_the_field_may_change_and_is_true_or_false():
    config = tiny_config('singleadv')
    old = config_lib.to_dict(config)
    config.debug.nans = True
    config_lib.validate(config)
    assert config_lib.changed_fields(old, config_lib.to_dict(config)) == []
    with config.ignore_type():
        config.debug.nans = 'yes'
    with pytest.raises(ConfigError, match=r"debug\.nans: expected True or False, found 'yes'"):
        config_lib.validate(config)
