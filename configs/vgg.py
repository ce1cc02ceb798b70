"""VGG: one VGG-like network, trained cleanly.

Reproduces: no row of the paper's tables; the second source of its transfer set (black-box), beside
  Baseline's Wide ResNet.
Run: python main.py --config=configs/vgg.py --workdir=DIR
Cost: 1 x VGG-16 of 64 to 512 channels, 14,724,042 parameters. Training takes 9.51e16 operations:
  16 minutes at a sustained 100 TFLOP/s. Evaluating the 100 snapshots adds 4e16, in float32, and the
  long attacks at most 3.2 of that. This is arithmetic from --mode=describe; nobody has measured it.
Expect, from the paper (nobody has run this config to its end yet): 94.5 % clean. The paper says
  "VGG-like" and "standard training procedures" and no more, so the size is a choice of ours.
"""

from ml_collections import ConfigDict

from configs import default


def system(config: ConfigDict) -> None:
    """Makes `config` one of this system: the diff is the experiment."""
    config.system = 'VGG'
    config.model.name = 'vgg'
    config.model.depth = 16
    # The original's 64 to 512 channels beside a Wide ResNet of width 10; in proportion elsewhere.
    config.model.width = max(1, round(0.4 * config.model.width))
    config.train.adversarial_weight = 0.0


def get_config() -> ConfigDict:
    config = default.get_config()
    system(config)
    return config
