"""PreActResNet18Fast: a PreActResNet-18, adversarially trained with one step in 30 epochs.

Reproduces: no row of the paper's tables, but fast adversarial training as of de Jorge et al.
  (NeurIPS 2022, "Make Some Noise"): N-FGSM, batches of 128, a learning rate that rises linearly to
  0.2 and falls to 0, weight decay 5e-4. As published nearly all of the loss is of adversarial
  images; the pass on clean images, 3/8 of the operations, is this program's.
Run: python main.py --config=configs/preactresnet18_fast.py --workdir=DIR
Cost: 1 x PreActResNet-18, 11,172,170 parameters. Training takes 1.16e16 operations: 2 minutes at a
  sustained 100 TFLOP/s. Evaluating the 10 snapshots adds 7e15, in float32, and the long attacks at
  most 2.3e17. This is arithmetic from --mode=describe; nobody has measured it.
Expect, from the literature (nobody has run this config to its end yet): 45 % under PGD, which Wong
  et al. (ICLR 2020, abstract) report for one step from a random start (attack.name=fgsm); N-FGSM is
  at least as good as the best methods of one step before it (de Jorge et al., abstract). Where
  single_step_accuracy leaves two_step_accuracy behind, training has failed.
"""

import pathlib

from ml_collections import ConfigDict

from configs import default

NETWORK = pathlib.Path(__file__).parent / 'networks' / 'preactresnet18.py'


def system(config: ConfigDict) -> None:
    """Makes `config` one of this system: the diff is the experiment."""
    config.system = 'PreActResNet18Fast'
    config.model.name = f'{NETWORK}:PreActResNet18'
    config.attack.name = 'n_fgsm'
    config.train.adversarial_weight = 1000.0
    config.train.schedule = 'linear'
    config.train.stop_on_overfitting = True


def get_config() -> ConfigDict:
    config = default.get_config()
    system(config)
    config.train.steps = 11_720  # 30 epochs
    config.train.learning_rate = 0.2
    config.train.warmup_steps = 5_860
    config.train.snapshot_every = 1_172
    return config
