"""Ensemble3 GAL: three members, trained cleanly to have input gradients that differ.

Reproduces: the gradient alignment loss of Kariyappa & Qureshi (2019, arXiv 1901.09981) with weight
  0.5, on this program's network and schedule, with SiLU where they have a leaky ReLU, and without
  their Gaussian noise on the images. The formula is that of other authors' code, see
  docs/extending.md, "Members that differ".
Run: python main.py --config=configs/ensemble3_gal.py --workdir=DIR
  Two members: --config.ensemble.size=2. With adversarial training:
  --config.train.adversarial_weight=1.
Cost: 3 x WRN-28-10, 109,437,582 parameters. Training takes 1.65e19 operations, three times those of
  clean training: 46 hours at a sustained 100 TFLOP/s. Activations take about 47 GiB in float32 over
  all devices. This is arithmetic from --mode=describe; nobody has measured it.
Expect (nobody has run this config yet): no robustness to speak of under AutoAttack at 8/255, as of
  any network that is trained cleanly; no published number was verified here.
"""

from ml_collections import ConfigDict

from configs import default


def system(config: ConfigDict) -> None:
    """Makes `config` one of this system: the diff is the experiment."""
    config.system = 'Ensemble3 GAL'
    config.ensemble.size = 3
    config.train.adversarial_weight = 0.0
    config.train.diversity = 'gal'
    config.model.activation = 'silu'


def get_config() -> ConfigDict:
    config = default.get_config()
    system(config)
    return config
