"""The paper's comparison on real images in a night of two CPU cores: six systems, three seeds.

Reproduces: the rows of Tables 1a, 1b and 1c for six of the eight systems, at a small scale: WRN-10-1
  instead of WRN-28-10, 1,500 steps of 64 examples instead of 500,000 of 128, and the learning rate
  lowered at 30, 60 and 80 % of the steps, as for Wide ResNets, instead of at 6, 12 and 18 %.
  DoubleAdv is a WRN-10-2: a WRN-10-1 has no half more channels. It takes about as long as
  Ensemble2Adv and has twice its parameters, where the paper's has as many.
Run: python main.py --mode=study --config=configs/cifar10_small.py --workdir=DIR
  The same command goes on after a stop. It needs CIFAR-10 in data.data_dir, or data.download=True.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.study.systems = (
        'baseline',
        'ensemble2',
        'singleadv',
        'doubleadv',
        'ensemble2adv',
        'separate2adv',
    )
    config.study.seeds = (0, 1, 2)
    config.study.planes = ('singleadv', 'ensemble2adv')
    config.model.depth = 10
    config.model.width = 1
    config.train.steps = 1_500
    config.train.batch_size = 64
    config.train.learning_rate_steps = (450, 900, 1_200)
    config.train.log_every = 50
    config.train.checkpoint_every = 250
    config.train.snapshot_every = 500
    config.eval.attacks = ('clean', 'ifgsm5', 'blackbox')
    config.eval.long_attacks = ('pgd20', 'autoattack(examples=1000)')
    config.blackbox.rounds = 4
    return config
