"""Baseline: one network, trained cleanly.

HEADER
"""

from ml_collections import ConfigDict

from configs import default


def system(config: ConfigDict) -> None:
    """Makes `config` one of this system: the diff is the experiment."""
    config.system = 'Baseline'
    config.train.adversarial_weight = 0.0


def get_config() -> ConfigDict:
    config = default.get_config()
    system(config)
    return config
