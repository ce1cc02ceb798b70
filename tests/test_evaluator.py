"""Networks under attack: every example once, whatever the batch, the packing and the devices."""

import functools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from ensadv import losses, prng
from ensadv.attacks import driver, registry
from ensadv.attacks.threat_model import ThreatModel
from ensadv.cpu import parts
from ensadv.evaluation import attack_settings, evaluator
from ensadv.models import conv, ensemble
from ensadv.runtime import distributed

# 17 test images, which divides by nothing: labels 0, 1, 2 come 5, 8 and 4 times.
LABELS = np.array([0, 1, 2, 1, 1, 0, 2, 1, 0, 1, 1, 2, 0, 1, 2, 1, 0], np.int32)
IMAGES = np.random.default_rng(0).integers(0, 256, (17, 4, 4, 1), np.uint8)


def biases(module):
    """Parameters as a network has them, with a collection for batch statistics."""
    module.variable('batch_stats', 'none', jnp.zeros, ())


class Constant(nn.Module):
    """The same logits for every image: class 1 wins by 0.5 over class 0."""

    @nn.compact
    def __call__(self, x, train):
        del train
        biases(self)
        bias = self.param('bias', lambda _: jnp.array([0.5, 1.0, -1.0]))
        return jnp.broadcast_to(bias, (len(x), 3)) + 1e-6 * jnp.mean(x, (1, 2, 3))[:, None] * bias


class Brightness(nn.Module):
    """Bright images are class 0, dark ones class 1."""

    @nn.compact
    def __call__(self, x, train):
        del train
        biases(self)
        scale = self.param('scale', lambda _: jnp.array(10.0))
        z = scale * (jnp.mean(x, axis=(1, 2, 3)) - 0.5)
        return jnp.stack([z, -z, jnp.full_like(z, -100)], axis=-1)


class Masked(nn.Module):
    """Brightness, with gradients that are zero or NaN; `every` image or the bright ones only."""

    how: str
    every: bool = True

    @nn.compact
    def __call__(self, x, train):
        logits = Brightness()(x, train)
        brightness = jnp.mean(x, axis=(1, 2, 3))
        masked = (brightness > 0.5)[:, None] | self.every
        hidden = jax.lax.stop_gradient(logits)
        if self.how == 'nan':
            # The square root's gradient is infinite at 0, and 0 times it is not a number.
            hidden += jnp.sqrt(jnp.where(masked, 0 * brightness[:, None], 1))
        return jnp.where(masked, hidden, logits)


class Ripples(nn.Module):
    """A random function with many hills: its examples fall at all sorts of steps, and get up."""

    @nn.compact
    def __call__(self, x, train):
        del train
        biases(self)
        x = nn.Dense(20, kernel_init=nn.initializers.normal(1.0))(x.reshape(len(x), -1))
        return nn.Dense(3)(jnp.sin(3 * x))


class Convolutions(nn.Module):
    """What a Wide ResNet is made of, once each."""

    @nn.compact
    def __call__(self, x, train):
        x = 8 * (x - 0.5)
        for stride in (1, 2):
            convolution = nn.Conv(
                16, (3, 3), stride, padding=1, conv_general_dilated=conv.get('auto')
            )
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(convolution(x)))
        return 10 * nn.Dense(3)(jnp.mean(x, axis=(1, 2)))


def network_of(module, shape=(4, 4, 1), k=2, combine='probs'):
    variables = ensemble.init(module, jax.random.key(0), k, shape)
    network = ensemble.Network(partial(ensemble.apply, module), combine, variables)
    return network, distributed.replicate(variables)


def settings_of(name, **changes):
    return attack_settings.evaluation_settings(
        tiny_config(eval__long_attacks=(name,), **changes), name
    )


@functools.cache
def bench_of(module, shape, batch_size):
    network, variables = network_of(module, shape)
    return evaluator.Evaluator(network, batch_size), variables


def evaluate(module, name, images=IMAGES, labels=LABELS, *, batch_size=5, long=False, **changes):
    bench, variables = bench_of(module, images.shape[1:], batch_size)
    run = bench.long_attack if long else bench.evaluate
    return run(variables, settings_of(name, **changes), images, labels, 'test')


@pytest.mark.parametrize('name', ['clean', 'ifgsm3', 'pgd3'])
@pytest.mark.parametrize('batch_size', [1, 5, 17, 100])
def test_constant_logits_have_the_accuracy_worked_out_by_hand(name, batch_size):
    verdicts = evaluate(Constant(), name, batch_size=batch_size)
    assert [len(column) for column in verdicts] == [17, 17, 17]
    assert np.mean(verdicts.margin > 0) == 8 / 17
    np.testing.assert_array_equal(verdicts.margin > 0, LABELS == 1)
    np.testing.assert_allclose(verdicts.margin[[0, 1, 2]], [-0.5, 0.5, -2.0], atol=1e-5)
    np.testing.assert_allclose(verdicts.margin, verdicts.last_margin, atol=1e-5)
    assert verdicts.has_gradient.all()


def test_a_model_whose_worst_case_is_known():
    """The mean brightness moves by epsilon, as far as the pixel box lets every pixel move."""
    toward = np.where(LABELS == 0, -1, 1)
    moved = np.clip(IMAGES / 255.0 + 0.15 * toward[:, None, None, None], 0, 1).mean((1, 2, 3))
    z = 10 * (moved - 0.5)
    expected = np.select([LABELS == 0, LABELS == 1], [2 * z, -2 * z], np.nan)
    known = np.isfinite(expected)
    margin = evaluate(Brightness(), 'ifgsm20').margin
    np.testing.assert_allclose(margin[known], expected[known], atol=1e-4)


@pytest.mark.parametrize('long', [False, True])
def test_an_example_is_attacked_alike_whichever_others_are_evaluated(long):
    bench, variables = bench_of(Brightness(), IMAGES.shape[1:], 5)
    attack = bench.long_attack if long else bench.evaluate
    # One step from a random start: the start shows in the margin.
    settings = settings_of('ifgsm1', eval__ifgsm__step_size=0.01)
    whole = attack(variables, settings, IMAGES, LABELS, 'test').margin
    places = np.array([3, 4, 11, 16])
    chosen = IMAGES[places], LABELS[places], 'test'
    some = attack(variables, settings, *chosen, split_places=places).margin
    np.testing.assert_allclose(some, whole[places], rtol=1e-5)
    others = attack(variables, settings, *chosen).margin
    assert not np.allclose(others, whole[places], rtol=1e-5)


def test_results_do_not_depend_on_the_batch_size(monkeypatch):
    monkeypatch.setattr(parts, '_IMAGES', 8)
    monkeypatch.setattr(parts, '_VALUES', 1)  # or such small images were not taken in parts
    results = [evaluate(Ripples(), 'pgd5', batch_size=b, epsilon=0.05) for b in (17, 3, 16)]
    for result in results[1:]:
        np.testing.assert_allclose(results[0], result, atol=1e-4)


@pytest.mark.parametrize(
    'num_steps, expected',
    [(1, (1,)), (2, (1, 2)), (7, (1, 2, 5, 7)), (500, (1, 2, 5, 10, 20, 50, 100, 200, 500))],
)
def test_the_steps_of_the_curve(num_steps, expected):
    assert evaluator.curve_steps(num_steps) == expected


def test_a_long_attack_says_at_which_step_each_example_fell():
    # Of class 0 while their mean is above 1/2; each step takes 0.002 off every pixel.
    levels = [128, 129, 130, 134, 140, 255, 100]
    images = np.stack([np.full((4, 4, 1), level, np.uint8) for level in levels])
    labels = np.zeros(len(levels), np.int32)
    verdicts = evaluate(
        Brightness(), 'ifgsm60', images, labels, long=True, batch_size=3, epsilon=0.5,
        eval__ifgsm__step_size=0.002, eval__ifgsm__start='none', eval__iterate_examples=0,
    )  # fmt: skip
    above = np.array(levels) / 255 - 0.5
    expected = np.where(above < 0, 0, np.ceil(above / 0.002))
    expected[-2] = driver.NEVER  # it would take 250 steps
    assert expected.tolist() == [1, 3, 5, 13, 25, driver.NEVER, 0]
    np.testing.assert_array_equal(verdicts.fooled_at, expected)
    assert verdicts.steps == (1, 2, 5, 10, 20, 50, 60)
    assert verdicts.iterate_margin.shape == (7, 0)
    np.testing.assert_allclose(verdicts.margin[-2], 20 * (above[-2] - 60 * 0.002), atol=1e-4)


RIPPLES = {
    'epsilon': 0.02, 'eval__pgd__step_size': 0.003, 'eval__ifgsm__step_size': 0.003,
    'eval__pgd__start': 'uniform', 'eval__ifgsm__start': 'uniform',
}  # fmt: skip


def ripples(n=61):
    """Images with the labels that the network gives them, but for a few."""
    images = np.random.default_rng(1).integers(0, 256, (n, 4, 4, 1), np.uint8)
    network, variables = network_of(Ripples())
    log_probs = np.asarray(network.log_probs(variables, images / np.float32(255)))
    labels = np.argmax(log_probs, axis=1).astype(np.int32)
    labels[:3] = (labels[:3] + 1) % 3
    return images, labels


def worst_case(module, settings, images, labels):
    """The attack as one whole, on all examples as one batch."""
    network, variables = network_of(module, images.shape[1:])
    key = prng.key(settings['seed'])
    keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(jnp.arange(len(labels)))
    attack = registry.make(settings, loss=losses.LOSSES[settings['loss']])
    return driver.worst_case(
        attack, lambda x: network.log_probs(variables, x), ThreatModel.of(settings), keys,
        images / np.float32(255), labels,
    )  # fmt: skip


@pytest.mark.parametrize('name', ['ifgsm7', 'pgd7'])
def test_an_attack_in_batches_is_the_attack_as_a_whole(name):
    images, labels = ripples()
    changes = RIPPLES | {'eval__pgd__restarts': 2, 'eval__ifgsm__schedule': 'cosine'}
    whole = worst_case(Ripples(), settings_of(name, **changes), images, labels)
    verdicts = evaluate(Ripples(), name, images, labels, batch_size=7, **changes)
    assert 5 < np.sum(verdicts.margin > 0) < 50
    for column, expected in zip(verdicts, whole[:3], strict=True):
        np.testing.assert_allclose(column, expected, atol=1e-5)


@pytest.mark.parametrize('restarts', [1, 3])
@pytest.mark.parametrize('stay', [0, 20, 1000])
# 16 are two parts, one of which is not computed where 8 or fewer are left.
@pytest.mark.parametrize('name, batch_size', [('ifgsm60', 16), ('pgd60', 7)])
def test_packing_changes_no_verdict(name, batch_size, stay, restarts, monkeypatch):
    monkeypatch.setattr(parts, '_IMAGES', 8)
    monkeypatch.setattr(parts, '_VALUES', 1)
    images, labels = ripples()
    changes = RIPPLES | {
        'eval__iterate_examples': stay,
        'eval__pgd__restarts': restarts,
        'eval__ifgsm__restarts': restarts,
    }
    settings = settings_of(name, **changes)
    whole = worst_case(Ripples(), settings, images, labels)
    packed = evaluate(Ripples(), name, images, labels, batch_size=batch_size, long=True, **changes)
    stands = whole.margin > 0
    # The case is one where something can go wrong.
    assert 5 < stands.sum() < 50
    assert len(set(packed.fooled_at.tolist())) > 4
    np.testing.assert_array_equal(packed.margin > 0, stands)
    np.testing.assert_array_equal(packed.fooled_at == driver.NEVER, stands)
    # Who stood to the end met every iterate.
    np.testing.assert_allclose(packed.margin[stands], whole.margin[stands], atol=1e-5)
    if restarts == 1:
        # So did who stayed.
        stayed = np.arange(len(labels)) < stay
        np.testing.assert_allclose(packed.margin[stayed], whole.margin[stayed], atol=1e-5)
        np.testing.assert_allclose(packed.iterate_margin[-1], whole.last_margin[:stay], atol=1e-5)


def test_the_curve_is_that_of_the_first_restart():
    images, labels = ripples()
    changes = RIPPLES | {'eval__iterate_examples': 0}
    once = evaluate(Ripples(), 'pgd10', images, labels, long=True, **changes)
    changes['eval__pgd__restarts'] = 4
    often = evaluate(Ripples(), 'pgd10', images, labels, long=True, **changes)
    np.testing.assert_array_equal(often.stands, once.stands)
    np.testing.assert_array_equal(once.stands[-1], once.margin > 0)
    assert np.sum(often.margin > 0) < np.sum(often.stands[-1])


def test_the_curve_is_that_of_shorter_attacks():
    images, labels = ripples()
    # Large steps, that leave the hills again.
    changes = RIPPLES | {'epsilon': 0.05, 'eval__ifgsm__step_size': 0.1}
    changes['eval__iterate_examples'] = 1000
    long = evaluate(Ripples(), 'ifgsm20', images, labels, long=True, **changes)
    gets_up = 0
    for place, steps in enumerate(long.steps):
        short = evaluate(Ripples(), f'ifgsm{steps}', images, labels, **changes)
        fallen = (long.fooled_at != driver.NEVER) & (long.fooled_at <= steps)
        np.testing.assert_array_equal(fallen, short.margin <= 0)
        np.testing.assert_allclose(long.iterate_margin[place], short.last_margin, atol=1e-5)
        gets_up += np.sum(short.last_margin > 0) > np.sum(short.margin > 0)
    # The current iterate's curve is another one than the worst iterate's.
    assert gets_up


def test_packing_a_convolutional_network_changes_no_verdict():
    levels = np.linspace(0.2, 1, 17)[:, None, None, None]
    images = (levels * IMAGES).astype(np.uint8).repeat(2, 1).repeat(2, 2)
    module = Convolutions()
    network, variables = network_of(module, (8, 8, 1))
    log_probs = np.asarray(network.log_probs(variables, images / np.float32(255)))
    labels = np.argmax(log_probs, axis=1).astype(np.int32)
    bench = evaluator.Evaluator(network, 4)
    settings = settings_of('pgd30', epsilon=0.1, eval__iterate_examples=0)
    whole = bench.evaluate(variables, settings, images, labels, 'test')
    packed = bench.long_attack(variables, settings, images, labels, 'test')
    assert 0 < np.sum(whole.margin > 0) < 17
    np.testing.assert_array_equal(packed.margin > 0, whole.margin > 0)


def test_fooled_examples_cost_nothing_more(monkeypatch):
    """17 examples in batches of 4: 15 fall at once, so one batch is left of five."""
    images = np.stack([np.full((4, 4, 1), 129, np.uint8)] * 15 + [np.full((4, 4, 1), 255)] * 2)
    images = images.astype(np.uint8)
    calls = []
    original = distributed.map_examples

    def counting(f, num_shared):
        mapped = original(f, num_shared)

        def call(*args):
            calls.append((num_shared, int(args[2]) if num_shared == 3 else 0))
            return mapped(*args)

        return call

    monkeypatch.setattr(distributed, 'map_examples', counting)
    evaluate(
        Brightness(), 'ifgsm50', images, np.zeros(17, np.int32), long=True, batch_size=4,
        epsilon=0.1, eval__iterate_examples=0, eval__ifgsm__step_size=0.01,
        eval__ifgsm__start='none',
    )  # fmt: skip
    steps = sum(count for shared, count in calls if shared == 3)
    assert steps == 5 * 1 + 49


@pytest.mark.parametrize('long', [False, True])
@pytest.mark.parametrize('how', ['zero', 'nan'])
def test_what_has_no_gradient_is_said_to_have_none(how, long):
    verdicts = evaluate(Masked(how), 'pgd5', long=long)
    assert not verdicts.has_gradient.any()
    # Their images stay images, and their margins numbers.
    assert np.isfinite(verdicts.margin).all()
    some = evaluate(Masked(how, every=False), 'pgd5', long=long, eval__pgd__start='none')
    bright = IMAGES.mean((1, 2, 3)) / 255 > 0.5
    np.testing.assert_array_equal(some.has_gradient[bright], False)
    assert some.has_gradient[~bright].all()


def test_schedules_end_near_where_they_were():
    """A step size that goes down to 0 takes half the way in all."""
    image = np.full((1, 4, 4, 1), 250, np.uint8)
    margins = {
        how: evaluate(
            Brightness(), 'ifgsm10', image, np.zeros(1, np.int32), epsilon=0.5,
            eval__ifgsm__step_size=0.02, eval__ifgsm__start='none', eval__ifgsm__schedule=how,
        ).margin[0]
        for how in ('constant', 'linear', 'cosine')
    }  # fmt: skip
    clean = 20 * (250 / 255 - 0.5)
    # The sums of 10 steps: 10, 10 - 45 / 10, and (10 + 1) / 2 times the step size.
    for how, steps in (('constant', 10), ('linear', 5.5), ('cosine', 5.5)):
        np.testing.assert_allclose(margins[how], clean - 20 * 0.02 * steps, atol=1e-4)


def test_an_attack_on_all_members_makes_every_member_err():
    network, variables = network_of(Ripples(), k=2, combine='logits')
    images, labels = ripples(30)
    bench = evaluator.Evaluator(network, 8)
    clean = bench.member_margins(variables, images, labels, 'members')
    assert clean.shape == (30, 2)
    x = images / np.float32(255)
    logits = network.member_logits(variables, x)
    for member in range(2):
        right = np.argmax(logits[member], axis=1) == labels
        np.testing.assert_array_equal(clean[:, member] > 0, right)
    places = np.array([1, 4, 5, 20, 29])
    settings = settings_of('pgd40', epsilon=0.2) | {'loss': 'best_margin'}
    x_adv = bench.points(variables, settings, images, labels, 'test', places=places).worst
    assert x_adv.shape == (5, 4, 4, 1)
    assert np.abs(x_adv - x[places]).max() <= 0.2 + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    errs = np.argmax(network.member_logits(variables, x_adv), axis=-1) != labels[places]
    # Each was attacked by its own key: the same as when all are.
    every = bench.points(variables, settings, images, labels, 'test').worst
    np.testing.assert_allclose(every[places], x_adv, atol=1e-5)
    assert np.mean(np.all(errs, axis=0)) >= 0.8
