"""The recipe of 2021 on two CPU cores: two networks, or one trained for twice as many steps?

Reproduces: nothing published. It asks the paper's question of a newer recipe, at the scale of
  cifar10_small.py: does Ensemble2 TRADES beat a single network that costs as much to train?
Run: python main.py --mode=study --config=configs/cifar10_small_trades.py --workdir=DIR
Cost: under way.
Expect: under way. One seed says nothing of others.
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
