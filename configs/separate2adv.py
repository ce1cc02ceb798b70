"""Separate2Adv: two members, each adversarially trained by itself.

HEADER
"""

from ml_collections import ConfigDict

from configs import default


def system(config: ConfigDict) -> None:
    """Makes `config` one of this system: the diff is the experiment."""
    config.system = 'Separate2Adv'
    config.ensemble.size = 2
    config.ensemble.training = 'separate'


def get_config() -> ConfigDict:
    config = default.get_config()
    system(config)
    return config
