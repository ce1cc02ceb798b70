"""SingleAdv: one network, trained adversarially.

HEADER
"""

from ml_collections import ConfigDict

from configs import default


def system(config: ConfigDict) -> None:
    """Makes `config` one of this system: the diff is the experiment."""
    config.system = 'SingleAdv'


def get_config() -> ConfigDict:
    config = default.get_config()
    system(config)
    return config
