"""DoubleAdv: one network 1.5 times as wide, trained adversarially.

HEADER
"""

from ml_collections import ConfigDict

from configs import default


def system(config: ConfigDict) -> None:
    """Makes `config` one of this system: the diff is the experiment."""
    config.system = 'DoubleAdv'
    # 1.5 times the width has about twice the parameters: WRN-28-15 for WRN-28-10.
    config.model.width = round(1.5 * config.model.width)


def get_config() -> ConfigDict:
    config = default.get_config()
    system(config)
    return config
