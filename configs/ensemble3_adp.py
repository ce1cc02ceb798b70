"""Ensemble3 ADP: three members, trained cleanly to differ in what they predict beside the label.

Reproduces: the regulariser of Pang et al. (ICML 2019, "Improving Adversarial Robustness via
  Promoting Ensemble Diversity") with their alpha 2 and beta 0.5, on this program's network and
  schedule; theirs are ResNet-20, Adam, 200 epochs. It is row Ensemble2 with another loss.
Run: python main.py --config=configs/ensemble3_adp.py --workdir=DIR
  Two members: --config.ensemble.size=2. With adversarial training:
  --config.train.adversarial_weight=1. More: docs/extending.md, "Members that differ".
Cost: 3 x WRN-28-10, 109,437,582 parameters. Training takes 5.5e18 operations, as much as clean
  training of three members: 15 hours at a sustained 100 TFLOP/s. This is arithmetic from
  --mode=describe; nobody has measured it.
Expect (nobody has run this config yet): no robustness to speak of. Three ResNet-20 trained
  with ADP, 92.88 % clean, keep 0.87 % of 10,000 test images under the attack MORA at epsilon 0.01
  (an evaluation that its authors published with their code); the default here is 8/255 = 0.031.
"""

from ml_collections import ConfigDict

from configs import default


def system(config: ConfigDict) -> None:
    """Makes `config` one of this system: the diff is the experiment."""
    config.system = 'Ensemble3 ADP'
    config.ensemble.size = 3
    config.train.adversarial_weight = 0.0
    config.train.diversity = 'adp'


def get_config() -> ConfigDict:
    config = default.get_config()
    system(config)
    return config
