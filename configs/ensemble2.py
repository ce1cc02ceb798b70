"""Ensemble2: two members, trained cleanly as one model.

Reproduces: the row Ensemble2 of the paper's Tables 1a, 1b, 1c.
Run: python main.py --config=configs/ensemble2.py --workdir=DIR
Cost: 2 x WRN-28-10, 72,958,388 parameters. Training takes 3.67e18 operations: 10 hours at a
  sustained 100 TFLOP/s. Evaluating the 100 snapshots adds 1.6e18, in float32, and the long attacks
  at most 3.2 of that. This is arithmetic from --mode=describe; nobody has measured it.
Expect, from the paper (nobody has run this config to its end yet):
  1a, last 10 evaluations, clean / IFGSM5 / PGD5 / PGD20 / black-box: .94 / .59 / .44 / .30 / .22
  1b, at the best IFGSM5,  clean / IFGSM5 / PGD5 / PGD20 / black-box: .95 / .65 / .52 / .38 / .22
  1c, after 500 steps, IFGSM / PGD: .13 / .02
  Compare `last_iterate_accuracy` in eval/<step>.json (docs/numbers.md, "Comparing with the paper").
"""

from ml_collections import ConfigDict

from configs import default


def system(config: ConfigDict) -> None:
    """Makes `config` one of this system: the diff is the experiment."""
    config.system = 'Ensemble2'
    config.ensemble.size = 2
    config.train.adversarial_weight = 0.0


def get_config() -> ConfigDict:
    config = default.get_config()
    system(config)
    return config
