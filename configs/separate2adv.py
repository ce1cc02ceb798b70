"""Separate2Adv: two members, each adversarially trained by itself.

Reproduces: the row Separate2Adv of the paper's Table 1c.
Run: python main.py --config=configs/separate2adv.py --workdir=DIR
Cost: 2 x WRN-28-10, 72,958,388 parameters. Training takes 2.44e19 operations: 2.8 days at a
  sustained 100 TFLOP/s. Evaluating the 100 snapshots adds 1.6e18, in float32, and the long attacks
  at most 3.2 of that. This is arithmetic from --mode=describe; nobody has measured it.
Expect, from the paper (nobody has run this config to its end yet):
  1c, after 500 steps, IFGSM / PGD: .49 / .47
  Compare `last_iterate_accuracy` in eval/<step>.json (docs/numbers.md, "Comparing with the paper").
"""

from ml_collections import ConfigDict

from configs import default


def system(config: ConfigDict) -> None:
    """Makes `config` one of this system: the diff is the experiment."""
    config.system = 'Separate2Adv'
    config.ensemble.size = 2
    config.ensemble.training = 'separate'


def get_config() -> ConfigDict:
    config = default.get_config()
    system(config)
    return config
