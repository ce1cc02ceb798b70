"""DoubleAdv: one network 1.5 times as wide, trained adversarially.

Reproduces: the row DoubleAdv of the paper's Tables 1a, 1b, 1c.
Run: python main.py --config=configs/doubleadv.py --workdir=DIR
Cost: 1 x WRN-28-15, 82,040,154 parameters. Training takes 2.74e19 operations: 3.2 days at a
  sustained 100 TFLOP/s. Evaluating the 100 snapshots adds 1.8e18, in float32, and the long attacks
  at most 3.2 of that. This is arithmetic from --mode=describe; nobody has measured it.
Expect, from the paper (nobody has run this config to its end yet):
  1a, last 10 evaluations, clean / IFGSM5 / PGD5 / PGD20 / black-box: .83 / .57 / .46 / .44 / .82
  1b, at the best IFGSM5,  clean / IFGSM5 / PGD5 / PGD20 / black-box: .85 / .60 / .48 / .47 / .84
  1c, after 500 steps, IFGSM / PGD: .47 / .47
  Compare `last_iterate_accuracy` in eval/<step>.json (docs/numbers.md, "Comparing with the paper").
"""

from ml_collections import ConfigDict

from configs import default


def system(config: ConfigDict) -> None:
    """Makes `config` one of this system: the diff is the experiment."""
    config.system = 'DoubleAdv'
    # 1.5 times the width has about twice the parameters: WRN-28-15 for WRN-28-10.
    config.model.width = round(1.5 * config.model.width)


def get_config() -> ConfigDict:
    config = default.get_config()
    system(config)
    return config
