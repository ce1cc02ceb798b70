"""The recipe of 2021 on two CPU cores: two networks, or one trained for twice as many steps?

Reproduces: nothing published. It asks the paper's question of a newer recipe, at the scale of
  cifar10_small.py: does Ensemble2 TRADES beat a single network that costs as much to train?
Run: python main.py --mode=study --config=configs/cifar10_small_trades.py --workdir=DIR
  It makes a transfer set in 37 minutes, or takes that of cifar10_small.py's study in SMALL with
  --config.eval.blackbox_path=SMALL/blackbox/blackbox.npz.
Cost: about 3.7 hours of one core (AMD EPYC, Zen 3, jax 0.10.2): 2.2 for the ensemble, 1.5 for the
  single network. Each training takes 8.18e13 operations, about 45 minutes.
Expect, on CIFAR-10 (JPEG copy), 2026-11-30, one seed, which says nothing of others; docs/results.md
  has the differences:
  clean / PGD20 / AutoAttack on 1,000 images: Ensemble2 TRADES 41.6 / 24.9 / 21.5,
  TRADES, twice the steps 47.3 / 26.2 / 20.5.
"""

from ml_collections import ConfigDict

from configs import cifar10_small


def get_config() -> ConfigDict:
    config = cifar10_small.get_config()
    config.study.systems = ('ensemble2_trades', 'wrn28_10_trades_long')
    config.study.seeds = (0,)
    config.study.planes = ()
    config.study.responses = ()
    config.train.warmup_steps = 25
    return config
