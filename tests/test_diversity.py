"""Methods that have members differ, against formulas written out again and known members."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny_config
from small_network import SmallNetwork

from ensadv import build, config_checks
from ensadv.errors import ConfigError
from ensadv.models import ensemble, features
from ensadv.models.norm import BatchNorm
from ensadv.training import costs, diversity, from_config, objectives, train
from ensadv.training.objectives import Predict, Prediction
from ensadv.training.step import initial_state, train_step

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 2, (3, 5, 4)).astype(np.float32)  # of three members, five images
LABELS = np.array([0, 3, 1, 1, 2])
X = jnp.asarray(RNG.uniform(0.1, 0.9, (8, 4, 4, 1)), jnp.float32)
Y = jnp.arange(8) % 3
KEYS = jax.random.split(jax.random.key(1), 8)
OPTIMIZER = optax.sgd(0.5)


class Linear(nn.Module):
    """Linear members, whose gradients are known."""

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3, use_bias=False, name='linear')(x.reshape(len(x), -1))


KERNELS = jnp.asarray(RNG.normal(0, 1, (3, 16, 3)), jnp.float32)


def linear(kernels, rng=None):
    return Predict(Linear(), 'probs', {'linear': {'kernel': kernels}}, {}, jnp.int32(0), rng)


def gradients_by_hand(kernels, x, y):
    """Of a linear member's cross-entropy: (p - y) W."""
    logits = jnp.einsum('bd,kdc->kbc', x.reshape(len(x), -1), kernels, precision='highest')
    errors = jax.nn.softmax(logits) - jax.nn.one_hot(y, 3)
    return jnp.einsum('kbc,kdc->kbd', errors, kernels, precision='highest')


def cosines_by_hand(gradients):
    units = gradients / jnp.linalg.norm(gradients, axis=-1, keepdims=True)
    return jnp.stack([(units[i] * units[j]).sum(-1) for i, j in ((0, 1), (0, 2), (1, 2))])


# ADP.


def test_entropy_and_determinant_are_those_of_the_mean_and_of_the_other_classes():
    probs = np.exp(LOGITS.astype(float))
    probs /= probs.sum(-1, keepdims=True)
    mean = probs.mean(0)
    entropy = -np.sum(mean * np.log(mean), -1)
    found = jax.jit(diversity.entropy_of_mean)(LOGITS)
    np.testing.assert_allclose(found, entropy, rtol=1e-5)
    determinants = []
    for image, label in enumerate(LABELS):
        others = np.delete(probs[:, image], label, axis=-1)
        units = others / np.linalg.norm(others, axis=-1, keepdims=True)
        determinants.append(np.log(np.linalg.det(units @ units.T + 1e-6 * np.eye(3))))
    found = jax.jit(diversity.log_determinant)(LOGITS, LABELS)
    np.testing.assert_allclose(found, determinants, rtol=1e-3, atol=1e-4)
    penalty = jax.jit(lambda logits: diversity.adp(2.0, 0.5)(Prediction(logits, None), LABELS))
    loss, metrics = penalty(LOGITS)
    expected = -2 * np.mean(entropy) - 0.5 * np.mean(determinants)
    np.testing.assert_allclose(loss, expected, rtol=1e-3)
    assert set(metrics) == {'entropy', 'log_determinant'}


def test_members_that_agree_or_are_sure_have_a_finite_determinant_and_gradient():
    alike = np.stack([LOGITS[0]] * 3)
    log_determinant = jax.jit(diversity.log_determinant)
    np.testing.assert_allclose(log_determinant(alike, LABELS), np.log(3e-12), atol=0.7)
    # All but certain of the label, in which case what is left of the others underflows.
    sure = LOGITS + 200 * np.eye(4)[LABELS].astype(np.float32)
    expected = log_determinant(LOGITS, LABELS)
    np.testing.assert_allclose(log_determinant(sure, LABELS), expected, rtol=1e-3)
    penalty = diversity.adp(2.0, 0.5)
    gradient = jax.jit(jax.grad(lambda z: penalty(Prediction(z, None), LABELS)[0]))
    for logits in (alike, sure):
        assert np.all(np.isfinite(gradient(logits)))


# GAL and TRS.


def test_input_gradients_are_of_each_members_own_cross_entropy():
    found = jax.jit(lambda: diversity.input_gradients(linear(KERNELS), X, Y))()
    assert (found.shape, found.dtype) == ((3, 8, 4, 4, 1), jnp.float32)
    expected = gradients_by_hand(KERNELS, X, Y)
    np.testing.assert_allclose(found.reshape(3, 8, -1), expected, rtol=1e-4, atol=1e-6)


def test_input_gradients_are_float32_where_members_are_not():
    model = SmallNetwork(num_classes=3, dtype=jnp.bfloat16)

    def found(x):
        variables = ensemble.init(model, jax.random.key(0), 2, (4, 4, 1))
        predict = Predict(model, 'probs', variables['params'], variables['batch_stats'])
        return diversity.input_gradients(predict, x, Y)

    assert jax.eval_shape(found, X) == jax.ShapeDtypeStruct((2, 8, 4, 4, 1), jnp.float32)


@pytest.mark.parametrize('method', ['gal', 'trs'])
def test_the_loss_and_its_gradient_are_those_of_the_formula(method):
    """They are differentiated twice; written out for linear members, once."""

    def found(kernels):
        predict = linear(kernels, KEYS)
        loss = diversity.gal(0.5) if method == 'gal' else diversity.trs(40.0, 0.1, 0.0)
        return loss(predict, X, None, Y)[0]

    def by_hand(kernels):
        gradients = gradients_by_hand(kernels, X, Y)
        cosines = cosines_by_hand(gradients)
        if method == 'gal':
            return 0.5 * jnp.mean(jnp.log(jnp.sum(jnp.exp(cosines), axis=0)))
        squares = jnp.sum(gradients**2, axis=-1)
        return 40 * jnp.mean(jnp.abs(cosines)) + 0.1 * jnp.mean(squares)

    values = (jax.jit(jax.value_and_grad(f))(KERNELS) for f in (found, by_hand))
    for ours, expected in zip(*values, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-5)


def test_a_sure_members_gradient_has_a_direction():
    """Its squares are no float32 numbers."""
    gradients = jnp.asarray(RNG.normal(0, 1, (3, 5, 16)), jnp.float32)
    scaled = gradients * jnp.array([1e-28, 1.0, 1e15])[:, None, None]
    cosines, expected = jax.jit(diversity.cosines), jax.jit(cosines_by_hand)(gradients)
    for found in (cosines(gradients), cosines(scaled)):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    none = jax.jit(jax.grad(lambda g: jnp.sum(diversity.cosines(g))))(jnp.zeros((2, 5, 16)))
    np.testing.assert_array_equal(none, 0)


def test_trs_looks_for_steep_points_near_every_second_image():
    predict = linear(KERNELS, KEYS)
    x = X.at[3].set(0.0).at[5].set(1.0)  # at the box's ends
    near = jax.jit(lambda: diversity.roughest(predict, x[1::2], Y[1::2], 0.05))()
    moves = np.abs(near - x[1::2])
    assert np.max(moves) <= 0.05 + 1e-6
    assert near.min() >= 0
    assert near.max() <= 1
    square = lambda points, y: np.sum(np.square(gradients_by_hand(KERNELS, points, y)), axis=(0, 2))
    assert np.all(square(near, Y[1::2]) >= square(x[1::2], Y[1::2]))
    # And it is those, and the others themselves, whose squares count.
    trs = diversity.trs(0.0, 2.0, 0.05)
    found, metrics = jax.jit(lambda: trs(predict, x, None, Y))()
    expected = np.mean([*square(near, Y[1::2]), *square(x[::2], Y[::2])]) / 3
    np.testing.assert_allclose(metrics['gradient_square'], expected, rtol=1e-4)
    np.testing.assert_allclose(found, 2 * expected, rtol=1e-4)


# DVERGE.


class Network(nn.Module):
    """Two linear layers, with batch norm of all devices if they have a name."""

    norm_axis: str | None = None

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(8, name='hidden')(x.reshape(len(x), -1))
        batch_norm = functools.partial(BatchNorm, momentum=0.9, epsilon=1e-5, name='norm')
        norm = batch_norm(use_running_average=not train, axis_name=self.norm_axis)
        return nn.Dense(3, name='linear')(nn.silu(norm(x)))


network = Network


@functools.cache
def first_state(k=3):
    initial = lambda: initial_state(network(), jax.random.key(2), k, (4, 4, 1), OPTIMIZER)
    return jax.jit(initial)()


def of_state(state, model=None, step=0):
    model = model or network()
    return Predict(model, 'probs', state.params, state.batch_stats, jnp.int32(step), KEYS)


@functools.partial(jax.jit, static_argnums=2)
def distances(state, points, layer):
    """Of each member's features of its points from those of each image's neighbour, [k]."""
    swapped = X[jnp.array([1, 0, 3, 2, 5, 4, 7, 6])]

    def of_member(params, batch_stats, points):
        variables = {'params': params, 'batch_stats': batch_stats}
        of = lambda x: features.of_layers(network(), variables, x)[layer]
        return jnp.sum((of(points) - of(swapped)) ** 2)

    return jax.vmap(of_member)(state.params, state.batch_stats, points)


@functools.cache
def distilled(layer, step=0):
    return distil_at(layer)(jnp.int32(step))


@functools.cache
def distil_at(layer):
    state = first_state()
    of_step = lambda step: of_state(state, step=step)
    return jax.jit(lambda step: diversity.distilled(of_step(step), X, 0.07, 10, layer, seed=3))


@pytest.mark.parametrize('layer', ['hidden', 'linear'])
def test_distilled_images_keep_their_looks_and_have_their_neighbours_features(layer):
    found = distilled(layer)
    assert found.shape == (3, *X.shape)
    assert 0.069 < np.max(np.abs(found - X)) <= 0.07 + 1e-6
    before = distances(first_state(), jnp.stack([X] * 3), layer)
    assert np.all(distances(first_state(), found, layer) < 0.95 * before)
    # Each member's own: their features differ.
    assert np.all(np.any(found[0] != found[1], axis=(1, 2, 3)))


def test_random_layers_are_drawn_for_each_step():
    def chosen(step):
        found = distilled('random', step)
        return [name for name in ('hidden', 'linear') if np.allclose(found, distilled(name))]

    found = [chosen(step) for step in range(8)]
    assert all(name in found for name in (['hidden'], ['linear'], []))  # or it was the other layer


@pytest.mark.parametrize('k', [2, 4])
def test_no_member_trains_on_what_was_distilled_from_itself(monkeypatch, k):
    """Every member sees every other one's images once, with the images' own labels."""
    marked = jnp.arange(k)[:, None, None, None, None] * jnp.ones((k, *X.shape))
    monkeypatch.setattr(diversity, 'distilled', lambda *args: marked)
    seen = []

    class Spy(Predict):
        def __call__(self, images):
            seen.append(images[:, 0, 0, 0, 0].astype(int).tolist())
            return Prediction(jnp.stack([jax.nn.one_hot(Y, 3)] * k), None)

    predict = Spy(None, '', {'w': jnp.zeros((k, 1))}, {}, jnp.int32(0))
    loss, metrics = diversity.dverge(0.07, 10)(predict, X, None, Y)
    for member in range(k):
        of_member = [images[member] for images in seen]
        assert sorted(of_member) == sorted({*range(k)} - {member})
    right = -np.log(np.e / (np.e + 2))
    np.testing.assert_allclose(loss, k * (k - 1) * right, rtol=1e-5)
    assert metrics['distilled_accuracy'] == 1


# In a step.


STATIC = ('model', 'optimizer', 'attack', 'combine', 'objective', 'mean_over_devices')
make_step = jax.jit(train_step, static_argnames=STATIC)


def step(objective, number=0, k=3, y=Y):
    state = first_state(k).replace(step=jnp.int32(number))
    return make_step(
        state, (X, y), KEYS, model=network(), optimizer=OPTIMIZER, combine='probs',
        attack=None, objective=objective,
    )  # fmt: skip


@functools.cache
def of_config(method='none', **changes):
    """One object for all tests, so that its step is compiled once."""
    fields = {f'train__{field}': value for field, value in changes.items()}
    return from_config.objective(tiny_config('ensemble4', train__diversity=method, **fields))


def test_members_cross_entropies_are_summed_and_each_descends_its_own():
    """As if it were alone."""
    together, metrics = step(of_config(cross_entropy_of='members'))
    single = objectives.paper(0.0)
    total = 0.0
    for i in range(3):
        state = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], first_state().params)
        before = first_state(1).replace(params=state)
        alone, its = make_step(
            before, (X, Y), KEYS, model=network(), optimizer=OPTIMIZER, combine='probs',
            attack=None, objective=single,
        )  # fmt: skip
        total += its['loss']
        jax.tree.map(
            lambda ours, its, i=i: np.testing.assert_allclose(ours[i], its[0], atol=1e-6),
            together.params, alone.params,
        )  # fmt: skip
    np.testing.assert_allclose(metrics['loss'], total, rtol=1e-6)


STARTS = {'dverge_start': 5, 'dverge_layer': 'hidden'}


def test_running_averages_take_in_only_what_members_are_trained_on():
    plain, _ = step(of_config(cross_entropy_of='members'))
    new, _ = step(of_config('gal'))
    same = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
    jax.tree.map(same, new.batch_stats, plain.batch_stats)
    kernels = (state.params['linear']['kernel'] for state in (new, plain))
    assert np.max(np.abs(np.subtract(*kernels))) > 1e-3
    # Before its start DVERGE trains on the images as they are, k - 1 times.
    new, _ = step(of_config('dverge', **STARTS), number=4)
    once = plain.batch_stats['norm']['mean'] / 0.1
    np.testing.assert_allclose(new.batch_stats['norm']['mean'], 0.19 * once, atol=1e-6)
    first, *biases = (state.params['linear']['bias'] for state in (first_state(), plain, new))
    np.testing.assert_allclose(biases[1] - first, 2 * (biases[0] - first), atol=1e-6)
    later, _ = step(of_config('dverge', **STARTS), number=5)
    kernels = (state.params['linear']['kernel'] for state in (later, new))
    assert np.max(np.abs(np.subtract(*kernels))) > 1e-4


def test_a_step_gives_trs_what_it_draws_from():
    one_step = functools.partial(
        train_step, model=network(), optimizer=OPTIMIZER, combine='probs', attack=None,
        objective=of_config('trs'),
    )  # fmt: skip
    _, metrics = jax.eval_shape(one_step, first_state(), (X, Y), KEYS)
    assert {'gradient_cosine', 'gradient_square', 'clean_accuracy'} <= set(metrics)


def test_without_weights_the_program_is_the_plain_one():
    def program(objective):
        return str(jax.make_jaxpr(functools.partial(train_step, model=network(), combine='probs',
            optimizer=OPTIMIZER, attack=None, objective=objective,
        ))(first_state(), (X, Y), KEYS))  # fmt: skip

    plain = {'cross_entropy_of': 'ensemble'}
    adp = of_config('adp', adp_alpha=0.0, adp_beta=0.0, **plain)
    assert program(adp) == program(of_config(**plain)) != program(of_config('adp', **plain))
    # The others would be terms of their own.
    assert len(of_config('gal', gal_weight=0.0).terms) == 1
    assert len(of_config('trs', trs_similarity=0.0, trs_smoothness=0.0).terms) == 1


@pytest.mark.parametrize('method, fields, number', [('gal', {}, 0), ('dverge', STARTS, 5)])
def test_two_devices_descend_one_gradient(method, fields, number):
    """Pairs of images stay on one device, and batch statistics are of both."""
    objective = of_config(method, **fields)
    one, _ = step(objective, number)
    before = first_state().replace(step=jnp.int32(number))

    @jax.jit
    @functools.partial(jax.vmap, axis_name='devices')
    def on_each(batch, keys):
        return train_step(
            before, batch, keys, model=network(norm_axis='devices'), combine='probs',
            optimizer=OPTIMIZER, attack=None, objective=objective,
            mean_over_devices=lambda tree: jax.lax.pmean(tree, 'devices'),
        )[0]  # fmt: skip

    two = on_each((X.reshape(2, 4, 4, 4, 1), Y.reshape(2, 4)), KEYS.reshape(2, 4))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-3, atol=2e-5),
        two.params, one.params,
    )  # fmt: skip


# From config fields.


def test_the_method_is_the_configs(monkeypatch):
    predict = lambda images: Prediction(jnp.asarray(LOGITS), ensemble.combine(
        jnp.asarray(LOGITS), 'probs'))  # fmt: skip
    objective = of_config('adp', adp_alpha=3.0, adp_beta=0.25, adversarial_weight=2.0)
    expected = np.sum(np.mean(-jax.nn.log_softmax(LOGITS)[:, np.arange(5), LABELS], axis=1))
    expected += diversity.adp(3.0, 0.25)(predict(0), LABELS)[0]
    for term, name in zip(objective.terms, ('clean', 'adversarial'), strict=True):
        # The penalty goes with both.
        loss, metrics = jax.jit(lambda term=term: term.loss(predict, 0, 0, LABELS))()
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        assert f'{name}_entropy' in metrics
    assert [len(of_config(method).terms) for method in config_checks.DIVERSITIES] == [1, 1, 2, 2, 1]
    found = of_config('gal', adversarial_weight=3.0, objective='paper')
    assert [term.weight for term in found.terms] == [1, 3.0, 1]
    assert found.scale == 0.25
    assert [term.weight for term in of_config('dverge', adversarial_weight=3.0).terms] == [1, 3.0]
    given = []
    for method in ('gal', 'trs', 'dverge'):
        monkeypatch.setattr(diversity, method, lambda *values: given.append(values))
    of_config('gal', gal_weight=2.0)
    of_config('trs', trs_similarity=3.0, trs_smoothness=2.0, trs_radius=0.1)
    fields = {'dverge_epsilon': 0.2, 'dverge_steps': 3, 'dverge_layer': 'norm', 'dverge_start': 1}
    of_config('dverge', **fields)
    assert given == [(2.0,), (3.0, 2.0, 0.1), (0.2, 3, 'norm', 1, 0)]


def test_layers_are_named_and_one_that_is_not_there_is_refused():
    dataset = {'num_classes': 3, 'mean': [0.5], 'std': [0.5], 'image_shape': [8, 8, 1]}
    blocks = [f'group_{group}_block_1' for group in (1, 2, 3)]
    config = tiny_config('ensemble2', train__diversity='dverge')
    model = build.model(config, dataset, dtype='bfloat16', remat=True)
    assert features.names(model, (8, 8, 1)) == ['conv_0', *blocks, 'linear', 'norm']
    config.train.dverge_layer = 'group_2_block_2'
    with pytest.raises(ConfigError, match="did you mean 'group_2_block_1'"):
        from_config.check_layer(config, model, (8, 8, 1))
    config.train.dverge_layer = 'norm'
    from_config.check_layer(config, model, (8, 8, 1))


def test_what_does_not_fit_devices_and_data_is_refused():
    dataset = {'num_train': 100, 'num_classes': 3, 'image_shape': [8, 8, 1]}
    odd = tiny_config('ensemble2', train__diversity='dverge', train__batch_size=9)
    with pytest.raises(ConfigError, match='even number of examples on each device'):
        train.check_fits(odd, dataset)
    many = tiny_config('ensemble4', train__diversity='adp')
    with pytest.raises(ConfigError, match='fewer members than the 3 classes'):
        train.check_fits(many, dataset)


def test_passes_are_counted():
    made = lambda method, **changes: costs.passes(
        tiny_config('ensemble4', train__diversity=method, **changes)
    )
    assert made('adp') == made('none')
    assert made('gal').gradient_updates == 1
    assert made('trs')[4:] == (0, 2, 3)
    assert made('trs', train__trs_smoothness=0.0)[4:] == (0, 1, 0)
    found = made('dverge', train__dverge_start=1, train__adversarial_weight=1.0)
    assert (found.updates, found.distillation_steps) == (4, 7.5)
