"""WRN-28-10 by a recipe of 2021: TRADES with SiLU, CutMix, averaged weights and a cosine schedule.

Reproduces: the recipe of Gowal et al. (2020, arXiv 2010.03593) and Rebuffi et al. (2021, arXiv
  2103.01946), by the settings of the training code that they published, without extra images: 400
  epochs in batches of 1,024. Other than theirs: the attack makes 10 steps of 2/255 along the
  gradient's sign, where their code has Adam; CutMix draws a box for each image, and the attack
  climbs away from the clean prediction; batch norm in the attack uses running averages.
Run: python main.py --config=configs/wrn28_10_trades.py --workdir=DIR
  With generated images, as their code has them: --config.data.extra=cifar10_ddpm.npz
  --config.data.extra_fraction=0.7, and --config.data.cutmix=0 (docs/data.md).
Cost: 1 x WRN-28-10, 36,479,194 parameters. Training takes 5.15e18 operations: 14 hours at a
  sustained 100 TFLOP/s. Evaluating the 20 snapshots adds 1.4e17, in float32, and the long attacks
  at most 2.2e18. Activations take about 44 GiB in bfloat16 over all devices; model.remat=True
  takes less. This is arithmetic from --mode=describe; nobody has measured it.
Expect, under AutoAttack on all test images, from the literature (nobody has run this config yet):
  clean / AutoAttack
  TRADES alone, WRN-34-10 (Zhang et al., 2019):                        84.92 / 53.08 (RobustBench)
  this recipe without CutMix, WRN-34-20 (Gowal et al., 2020):          85.64 / 56.86 (their code)
  with CutMix and a million generated images (Rebuffi et al., 2021):   87.33 / 60.75 (their code)
"""

from ml_collections import ConfigDict

from configs import default


def recipe(config: ConfigDict) -> None:
    """Gives `config` the recipe, but for the network's size and what a study's systems share."""
    config.model.activation = 'silu'
    config.data.cutmix = 1.0
    config.train.objective = 'trades'
    config.train.schedule = 'cosine'
    config.train.nesterov = True
    config.train.weight_decay_on = 'kernels'
    config.train.ema_decay = 0.995
    config.attack.steps = 10
    config.attack.start = 'uniform'


def schedule(config: ConfigDict) -> None:
    """Gives `config` the number and size of the steps."""
    config.train.steps = 19_531  # 400 epochs
    config.train.batch_size = 1024
    config.train.learning_rate = 0.4
    config.train.warmup_steps = 488  # 10 epochs
    config.train.snapshot_every = 977  # 20 epochs


def system(config: ConfigDict) -> None:
    """Makes `config` one of this system: the diff is the experiment."""
    config.system = 'TRADES'
    recipe(config)


def get_config() -> ConfigDict:
    config = default.get_config()
    system(config)
    schedule(config)
    return config
