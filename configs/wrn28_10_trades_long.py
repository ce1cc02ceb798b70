"""A WRN-28-10 by the recipe of wrn28_10_trades.py, for twice as many steps.

Reproduces: nothing published. It is the single network that costs as much to train as the ensemble
  of ensemble2_trades.py, and so what that has to be better than.
Run: python main.py --config=configs/wrn28_10_trades_long.py --workdir=DIR
Cost: 1 x WRN-28-10, 36,479,194 parameters. Training takes 1.03e19 operations: 29 hours at a
  sustained 100 TFLOP/s. This is arithmetic from --mode=describe; nobody has measured it.
Expect: nobody has run this config yet. At a small scale see cifar10_small_trades.py.
"""

from ml_collections import ConfigDict

from configs import default, wrn28_10_trades


def system(config: ConfigDict) -> None:
    """Makes `config` one of this system: the diff is the experiment."""
    config.system = 'TRADES, twice the steps'
    wrn28_10_trades.recipe(config)
    config.train.steps *= 2
    config.train.warmup_steps *= 2


def get_config() -> ConfigDict:
    config = default.get_config()
    wrn28_10_trades.schedule(config)
    system(config)
    return config
