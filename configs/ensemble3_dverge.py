"""Ensemble3 DVERGE: three members, each trained on images distilled from the others.

Reproduces: the training of Yang et al. (NeurIPS 2020, "DVERGE: Diversifying Vulnerabilities for
  Enhanced Robust Generation of Ensembles") with their epsilon 0.07 and ten steps, on this program's
  network and schedule; theirs are ResNet-20, 200 epochs. They begin with members of 200 epochs;
  here clean training takes the first 10,000 steps, 26 epochs, of the same schedule. More:
  docs/extending.md, "Members that differ".
Run: python main.py --config=configs/ensemble3_dverge.py --workdir=DIR
  Two members: --config.ensemble.size=2. With adversarial training:
  --config.train.adversarial_weight=1.
Cost: 3 x WRN-28-10, 109,437,582 parameters. Training takes 4.69e19 operations, nine times those of
  clean training: 5.4 days at a sustained 100 TFLOP/s. This is arithmetic from --mode=describe;
  nobody has measured it.
Expect (nobody has run this config yet): images made on other networks fool it less often, which is
  what the authors train for. Under AutoAttack at 8/255 no published number was verified here.
"""

from ml_collections import ConfigDict

from configs import default


def system(config: ConfigDict) -> None:
    """Makes `config` one of this system: the diff is the experiment."""
    config.system = 'Ensemble3 DVERGE'
    config.ensemble.size = 3
    config.train.adversarial_weight = 0.0
    config.train.diversity = 'dverge'


def get_config() -> ConfigDict:
    config = default.get_config()
    system(config)
    config.train.dverge_start = 10_000
    return config
