"""Ensemble2AdvGating: two members, adversarially trained as one model that weighs them by image.

Reproduces: nothing with numbers. Section 3 of the paper mentions "a 'gating network' to generate
  data-dependent weights for each model rather than a simple average, though we found the
  performance to be similar", and says no more: the gates of ensadv/models/gated.py are ours.
Run: python main.py --config=configs/ensemble2adv_gating.py --workdir=DIR
Cost: 2 x WRN-28-10 with a gate each, 72,968,630 parameters. Training takes 2.44e19 operations: 2.8
  days at a sustained 100 TFLOP/s. Evaluating the 100 snapshots adds 1.6e18, in float32, and the
  long attacks at most 3.2 of that. This is arithmetic from --mode=describe; nobody has measured it.
Expect, from those words (nobody has run this config to its end yet): about what ensemble2adv.py
  expects.
"""

from ml_collections import ConfigDict

from configs import default


def system(config: ConfigDict) -> None:
    """Makes `config` one of this system: the diff is the experiment."""
    config.system = 'Ensemble2AdvGating'
    config.ensemble.size = 2
    config.ensemble.combine = 'gating'


def get_config() -> ConfigDict:
    config = default.get_config()
    system(config)
    return config
