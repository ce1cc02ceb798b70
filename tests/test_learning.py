"""Training learns: under attack, adversarially trained weights stand where cleanly trained fall."""

import flax.linen as nn
from conftest import tiny_config
from etils import epath
from small_network import wide_resnet

from ensadv import study
from ensadv.architectures import ARCHITECTURES
from ensadv.models.base import ImageNetwork
from ensadv.storage import workdir

STEPS = 300


class Network(ImageNetwork):
    """A convolution and a hidden layer: soon compiled, and robust after seconds of training."""

    @nn.compact
    def __call__(self, x, train):
        x = self.convolution()(16, (3, 3), padding=1, name='conv')(self.standardise(x))
        x = nn.relu(self.norm(train)(name='norm')(x))
        x = nn.relu(nn.Dense(64, name='hidden')(x.reshape(len(x), -1)))
        return self.linear()(x)


def accuracies(system, path):
    """Trains a system on the digits as `main` does; returns its last snapshot's accuracies."""
    config = tiny_config(
        system, attack__steps=5, eval__attacks=('clean', 'pgd10'), eval__num_examples=360,
        eval__batch_size=360, train__batch_size=64, train__learning_rate=0.05,
        train__learning_rate_steps=(200,), train__steps_per_call=100, train__steps=STEPS,
        train__log_every=STEPS, train__checkpoint_every=STEPS, train__snapshot_every=STEPS,
    )  # fmt: skip
    study.run_one(config, epath.Path(path), system)
    results = workdir.read_evaluations(epath.Path(path))[STEPS]['attacks']
    return {result['name']: result['accuracy'] for result in results}


def test_robust_accuracy_comes_of_adversarial_training(tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, 'wide_resnet', wide_resnet(Network))
    clean = accuracies('baseline', tmp_path / 'baseline')
    assert clean['clean'] > 0.93
    assert clean['pgd10'] < 0.1
    adversarial = accuracies('singleadv', tmp_path / 'singleadv')
    assert adversarial['clean'] > 0.93
    assert adversarial['pgd10'] > 0.35
