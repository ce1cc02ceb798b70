"""Separate2Adv: two members, each adversarially trained by itself.

Reproduces: the row Separate2Adv of the paper's Table 1c.
Run: python main.py --config=configs/separate2adv.py --workdir=DIR
Cost: 2 x WRN-28-10, 72,958,388 parameters; 2.44e19 operations to train, which is 2.8 days at a
  sustained 100 TFLOP/s. Evaluating its 100 snapshots adds 1.6e18, in float32.
  The long attacks add at most 0.6 of that.
  This is arithmetic from --mode=describe, not measured.
Expect, from the paper (nobody has run this config to its end yet):
  1c, after 500 steps, IFGSM / PGD: .49 / .47
  Compare `last_iterate_accuracy` of eval/<step>.json; see "Comparing with the paper" in README.md.
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
