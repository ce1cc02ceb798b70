"""Ensemble3 TRS: three members, trained cleanly to have small input gradients that differ.

Reproduces: the regulariser of Yang et al. (NeurIPS 2021, "TRS: Transferability Reduced Ensemble via
  Promoting Gradient Diversity and Model Smoothness") with their coefficients for CIFAR-10, on this
  program's network and schedule; theirs are ResNet-20, Adam, 120 epochs. Their radius grows to
  0.03 over training, here it stays there. More: docs/extending.md, "Members that differ".
Run: python main.py --config=configs/ensemble3_trs.py --workdir=DIR
  Two members: --config.ensemble.size=2. With adversarial training:
  --config.train.adversarial_weight=1.
Cost: 3 x WRN-28-10, 109,437,582 parameters. Training takes 4.95e19 operations, nine times those of
  clean training: 5.7 days at a sustained 100 TFLOP/s. This is arithmetic from --mode=describe;
  nobody has measured it.
Expect (nobody has run this config yet): fewer correct clean images than without it, since its
  weights are large; users of the authors' code report about 60 % (its first issue, answered by the
  authors with the coefficients that are the defaults here). No number under AutoAttack at 8/255 was
  verified here.
"""

from ml_collections import ConfigDict

from configs import default


def system(config: ConfigDict) -> None:
    """Makes `config` one of this system: the diff is the experiment."""
    config.system = 'Ensemble3 TRS'
    config.ensemble.size = 3
    config.train.adversarial_weight = 0.0
    config.train.diversity = 'trs'


def get_config() -> ConfigDict:
    config = default.get_config()
    system(config)
    return config
