"""Ensemble4: four members, trained cleanly as one model.

Reproduces: the row Ensemble4 of the paper's Tables 1a, 1b.
Run: python main.py --config=configs/ensemble4.py --workdir=DIR
Cost: 4 x WRN-28-10, 145,916,776 parameters. Training takes 7.33e18 operations: 20 hours at a
  sustained 100 TFLOP/s. Evaluating the 100 snapshots adds 3.2e18, in float32, and the long attacks
  at most 3.2 of that. This is arithmetic from --mode=describe; nobody has measured it.
Expect, from the paper (nobody has run this config to its end yet):
  1a, last 10 evaluations, clean / IFGSM5 / PGD5 / PGD20 / black-box: .91 / .50 / .40 / .34 / .26
  1b, at the best IFGSM5,  clean / IFGSM5 / PGD5 / PGD20 / black-box: .93 / .60 / .48 / .43 / .24
  Compare `last_iterate_accuracy` in eval/<step>.json (docs/numbers.md, "Comparing with the paper").
"""

from ml_collections import ConfigDict

from configs import default


def system(config: ConfigDict) -> None:
    """Makes `config` one of this system: the diff is the experiment."""
    config.system = 'Ensemble4'
    config.ensemble.size = 4
    config.train.adversarial_weight = 0.0


def get_config() -> ConfigDict:
    config = default.get_config()
    system(config)
    return config
