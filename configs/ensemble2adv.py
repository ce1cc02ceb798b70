"""Ensemble2Adv: two members, adversarially trained as one model.

Reproduces: the row Ensemble2Adv of the paper's Tables 1a, 1b, 1c.
Run: python main.py --config=configs/ensemble2adv.py --workdir=DIR
Cost: 2 x WRN-28-10, 72,958,388 parameters. Training takes 2.44e19 operations: 2.8 days at a
  sustained 100 TFLOP/s. Evaluating the 100 snapshots adds 1.6e18, in float32, and the long attacks
  at most 3.2 of that. This is arithmetic from --mode=describe; nobody has measured it.
Expect, from the paper (nobody has run this config to its end yet):
  1a, last 10 evaluations, clean / IFGSM5 / PGD5 / PGD20 / black-box: .85 / .62 / .55 / .52 / .83
  1b, at the best IFGSM5,  clean / IFGSM5 / PGD5 / PGD20 / black-box: .87 / .64 / .56 / .52 / .85
  1c, after 500 steps, IFGSM / PGD: .55 / .52
  Compare `last_iterate_accuracy` in eval/<step>.json (docs/numbers.md, "Comparing with the paper").
"""

from ml_collections import ConfigDict

from configs import default


def system(config: ConfigDict) -> None:
    """Makes `config` one of this system: the diff is the experiment."""
    config.system = 'Ensemble2Adv'
    config.ensemble.size = 2


def get_config() -> ConfigDict:
    config = default.get_config()
    system(config)
    return config
