"""Table 1 of the paper: all eight systems, three seeds each, at the paper's settings."""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.study.systems = (
        'baseline',
        'ensemble2',
        'ensemble4',
        'singleadv',
        'doubleadv',
        'ensemble2adv',
        'ensemble4adv',
        'separate2adv',
    )
    config.study.seeds = (0, 1, 2)
    return config
