"""Table 1 of the paper: all eight systems, three seeds each, at the paper's settings.

Reproduces: Tables 1a, 1b and 1c, figures 2a, 2b and 2c, figure 3 as measured, and figure 4 of
  two of the systems, in DIR/report.
Run: python main.py --mode=study --config=configs/table1.py --workdir=DIR
  The 24 runs follow one another. To share them out, train each on a machine of its own:
    python main.py --config=configs/SYSTEM.py --config.seed=SEED --workdir=DIR/SYSTEM_seedSEED
  as in DIR/ensemble2adv_seed1. The study then finds them finished and writes the report.
  It first makes the transfer set, in DIR/blackbox, from two clean runs of its own. To use a set
  that configs/blackbox.py made, add --config.eval.blackbox_path=FILE, on the machines that train,
  too.
Cost: training all 24 takes 4.5e20 operations (1.5e20 a seed): 52 days at a sustained 100 TFLOP/s.
  Evaluating their 100 snapshots each adds 4.8e19, in float32, and the long attacks at most 3.2 of
  that. This is arithmetic from --mode=describe; nobody has measured it.
Expect, from the paper (nobody has run this config to its end yet): the rows in the header of each
  system's config. See docs/numbers.md, "Comparing with the paper". At a small scale see
  cifar10_small.py.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.study.systems = (
        'baseline',
        'ensemble2',
        'ensemble4',
        'singleadv',
        'doubleadv',
        'ensemble2adv',
        'ensemble4adv',
        'separate2adv',
    )
    config.study.seeds = (0, 1, 2)
    config.study.planes = ('singleadv', 'ensemble2adv')
    config.study.responses = ('singleadv', 'doubleadv', 'ensemble2adv', 'separate2adv')
    config.eval.attacks = ('clean', 'ifgsm5', 'ifgsm7', 'pgd5', 'pgd20', 'blackbox')
    return config
