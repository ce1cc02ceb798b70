"""SingleAdv: one network, trained adversarially.

Reproduces: the row SingleAdv of the paper's Tables 1a, 1b, 1c.
Run: python main.py --config=configs/singleadv.py --workdir=DIR
Cost: 1 x WRN-28-10, 36,479,194 parameters. Training takes 1.22e19 operations: 1.4 days at a
  sustained 100 TFLOP/s. Evaluating the 100 snapshots adds 0.8e18, in float32, and the long attacks
  at most 3.2 of that. This is arithmetic from --mode=describe; nobody has measured it.
Expect, from the paper (nobody has run this config to its end yet):
  1a, last 10 evaluations, clean / IFGSM5 / PGD5 / PGD20 / black-box: .82 / .55 / .44 / .43 / .80
  1b, at the best IFGSM5,  clean / IFGSM5 / PGD5 / PGD20 / black-box: .84 / .57 / .46 / .45 / .81
  1c, after 500 steps, IFGSM / PGD: .46 / .44
  Compare `last_iterate_accuracy` in eval/<step>.json (docs/numbers.md, "Comparing with the paper").
"""

from ml_collections import ConfigDict

from configs import default


def system(config: ConfigDict) -> None:
    """Makes `config` one of this system: the diff is the experiment."""
    config.system = 'SingleAdv'


def get_config() -> ConfigDict:
    config = default.get_config()
    system(config)
    return config
