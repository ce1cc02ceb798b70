"""Two WRN-28-10, trained as one model by the recipe of wrn28_10_trades.py.

Reproduces: nothing published. It asks the paper's question of a newer recipe: does an ensemble that
  is trained jointly pay for its computation? wrn28_10_trades_long.py is the single network that
  costs as much to train, and cifar10_small_trades.py compares the two at a small scale.
Run: python main.py --config=configs/ensemble2_trades.py --workdir=DIR
Cost: 2 x WRN-28-10, 72,958,388 parameters. Training takes 1.03e19 operations: 29 hours at a
  sustained 100 TFLOP/s. Evaluating the 20 snapshots adds 2.9e17, in float32, and the long attacks
  at most 4.5e18. This is arithmetic from --mode=describe; nobody has measured it.
Expect: nobody has run this config yet. At a small scale see cifar10_small_trades.py.
"""

from ml_collections import ConfigDict

from configs import default, wrn28_10_trades


def system(config: ConfigDict) -> None:
    """Makes `config` one of this system: the diff is the experiment."""
    config.system = 'Ensemble2 TRADES'
    config.ensemble.size = 2
    wrn28_10_trades.recipe(config)


def get_config() -> ConfigDict:
    config = default.get_config()
    system(config)
    wrn28_10_trades.schedule(config)
    return config
