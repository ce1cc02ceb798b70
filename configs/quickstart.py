"""The study of table1.py in minutes on a laptop: tiny networks on scikit-learn's digits."""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.study.systems = ('baseline', 'singleadv', 'doubleadv', 'ensemble2adv', 'separate2adv')
    config.epsilon = 0.15
    config.data.name = 'digits'
    config.data.pad = 1
    config.model.depth = 10
    config.model.width = 2
    config.train.steps = 300
    config.train.batch_size = 64
    config.train.learning_rate_steps = (200,)
    config.train.steps_per_call = 25
    config.train.log_every = 50
    config.train.checkpoint_every = 100
    config.train.snapshot_every = 100
    config.eval.attacks = ('clean', 'ifgsm5', 'pgd5', 'pgd20')
    config.eval.batch_size = 180
    return config
