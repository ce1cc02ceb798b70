"""The watch for catastrophic overfitting, on planted accuracies and in a run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import snapshot_bytes, tensorboard_values, tiny_config

from ensadv import build, losses
from ensadv.attacks import driver
from ensadv.attacks.first_order import IFGSM
from ensadv.attacks.threat_model import ThreatModel
from ensadv.errors import TrainingError
from ensadv.models import ensemble
from ensadv.runtime import distributed
from ensadv.storage import checkpoints
from ensadv.training import overfitting, streams, train

pytestmark = pytest.mark.usefixtures('small_network')


def seen(single, two):
    return {overfitting.SINGLE: jnp.array(single), overfitting.TWO: jnp.array(two)}


def test_each_onset_is_told_once_with_its_step_and_numbers(caplog):
    watch = overfitting.Watch(tiny_config(train__overfitting_gap=0.3))
    for step, single, two in (
        (10, 0.6, 0.31),  # nearer than the gap
        (20, 0.9, 0.55),  # an onset
        (30, 1.0, 0.0),
        (40, 0.6, 0.4),  # not recovered yet
        (50, 0.9, 0.5),
        (60, 0.5, 0.4),  # recovered
        (70, 0.8, 0.4),  # the next onset
    ):
        assert watch.metrics(step, seen([single], [two])) == pytest.approx(
            {'single_step_accuracy': single, 'two_step_accuracy': two}
        )
    first, second = caplog.messages
    assert first.startswith(
        'step 20: catastrophic overfitting: on a training batch the accuracy is 0.90 under the '
        "training attack's single step and 0.55 under two steps. "
    )
    assert 'attack.name=n_fgsm' in first
    assert second.startswith('step 70: ')


def test_one_of_several_members_is_enough(caplog):
    watch = overfitting.Watch(tiny_config('separate2adv'))
    found = watch.metrics(5, seen([0.5, 0.9, 0.4, 0.4], [0.5, 0.6, 0.5, 0.4]))
    assert found == pytest.approx({'single_step_accuracy': 0.55, 'two_step_accuracy': 0.5})
    assert 'catastrophic overfitting of member 1: ' in caplog.messages[0]
    assert 'the accuracy is 0.90 ' in caplog.messages[0]


@pytest.mark.parametrize(
    'changes, expected',
    [
        ({}, False),
        ({'attack__steps': 1}, True),
        ({'attack__name': 'pgd', 'attack__steps': 1}, True),
        ({'attack__name': 'fgsm'}, True),
        ({'attack__name': 'n_fgsm', 'train__adversarial_weight': 0.0}, False),
    ],
)
def test_training_with_one_step_is_watched(changes, expected):
    assert overfitting.is_watched(tiny_config(**changes)) == expected


def test_looking_alters_no_training_and_is_of_the_next_batch(workdir, monkeypatch):
    """The numbers of the last step, once more: by the attacks that they are of, on its weights."""
    config = tiny_config('separate2adv', attack__name='fgsm', attack__loss='margin')
    config.data.on_device = 'no'
    train.run(config, workdir / 'watched')
    with monkeypatch.context() as patch:
        patch.setattr(overfitting, 'is_watched', lambda config: False)
        train.run(config, workdir / 'alone')
    found = [snapshot_bytes(config, workdir / name, 4) for name in ('watched', 'alone')]
    assert found[0] == found[1]
    values = tensorboard_values(workdir / 'watched')
    assert 'two_step_accuracy' not in tensorboard_values(workdir / 'alone')

    dataset = build.dataset(config)
    network = build.network(config, dataset.describe())
    tree = checkpoints.open_snapshots(workdir / 'watched').restore(4, network.variables)
    arrays = streams.Examples(dataset.image_train, dataset.label_train)
    sampling = streams.sampling(config, dataset.describe())
    keys = streams.learner_keys(config)
    draw = distributed.run_on_devices(functools.partial(streams.draw_batch, sampling), 3)
    threat = ThreatModel('linf', config.epsilon)
    of_steps = lambda steps, size: IFGSM(steps, size, start='uniform', loss=losses.negative_margin)
    for name, one in (
        ('single_step_accuracy', of_steps(1, 1.25 * config.epsilon)),
        ('two_step_accuracy', of_steps(2, 0.5 * config.epsilon)),
    ):
        right = []
        for i in range(2):
            own = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], tree)
            (x, y), rng = draw(jnp.int32(4), arrays, jax.tree.map(lambda leaf, i=i: leaf[i], keys))
            predict = lambda x, own=own: ensemble.combine(network.member_logits(own, x), 'probs')
            attacked = jax.jit(driver.last_iterate, static_argnums=(0, 1, 2))
            x_adv = attacked(one, predict, threat, rng, x, y)
            right.append(np.mean(np.asarray(losses.margin(predict(x_adv), y)) > 0))
        assert dict(values[name])[4] == pytest.approx(np.mean(right), abs=1e-6)


def test_it_stops_before_anything_bad_is_written_and_tells_how_to_go_on(
    workdir, monkeypatch, caplog
):
    """Planted: from step 3 on the network resists one step alone."""
    accuracies = lambda config, model, draw: lambda state, *_: seen([float(state.step > 2)], [0.0])
    monkeypatch.setattr(overfitting, 'make_accuracies', accuracies)
    config = tiny_config(
        attack__name='n_fgsm', train__stop_on_overfitting=True, train__steps=6,
        train__log_every=1, train__checkpoints_to_keep=1, train__snapshot_every=100,
    )  # fmt: skip

    def steps():
        opened = checkpoints.open_checkpoints(workdir, 1), checkpoints.open_snapshots(workdir)
        return [each.steps() for each in opened]

    for _ in range(2):  # it goes on from there, and to there
        with pytest.raises(TrainingError, match=r'^step 3: catastrophic overfitting') as caught:
            train.run(config, workdir)
        assert 'Checkpoint and snapshot of step 2 are from before, and stay: ' in str(caught.value)
        assert steps() == [[2], [2]]
    config.train.steps, config.train.stop_on_overfitting = 4, False
    train.run(config, workdir)
    assert steps() == [[4], [2, 4]]
    assert 'step 3: catastrophic overfitting' in caplog.text
    config.train.steps, config.train.stop_on_overfitting = 6, True
    with pytest.raises(TrainingError, match=r'step 4: .* no good one is left'):
        train.run(config, workdir)
