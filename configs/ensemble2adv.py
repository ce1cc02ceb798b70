"""Ensemble2Adv: two members, adversarially trained as one model.

HEADER
"""

from ml_collections import ConfigDict

from configs import default


def system(config: ConfigDict) -> None:
    """Makes `config` one of this system: the diff is the experiment."""
    config.system = 'Ensemble2Adv'
    config.ensemble.size = 2


def get_config() -> ConfigDict:
    config = default.get_config()
    system(config)
    return config
