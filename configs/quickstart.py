"""The study of table1.py in minutes on a laptop: tiny networks on scikit-learn's digits.

Reproduces: nothing of the paper's; five of its systems, one seed each, on 1,797 real 8x8 images.
  It shows that all parts work, and on a small scale what adversarial training changes.
Run: make quickstart
  That is python main.py --mode=study --config=configs/quickstart.py --workdir=runs/quickstart
  AutoAttack is made on the first 36 of the 360 test images, which takes about a quarter of the
  time; eval.long_attacks=pgd50,autoattack makes it on all. With blackbox among eval.attacks it also
  makes a transfer set, from two more runs, and the column black-box; with study.audit=True an
  audit of each run; and with study.members=True it measures what the members of ensembles do.
Cost: 600 steps of 64 examples for each run; SingleAdv has 303,418 parameters. 9 to 22 minutes on
  two CPU cores (two machines with AMD EPYC, jax 0.10.2), with compiling and the report.
Expect: over 98 % clean accuracy everywhere; at PGD20 under 2 % for Baseline and 76 to 84 % for the
  others; on the 36 images of AutoAttack 0 % and 75 to 87 %. One seed says nothing of others:
  docs/numbers.md has three seeds of each.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.study.systems = ('baseline', 'singleadv', 'doubleadv', 'ensemble2adv', 'separate2adv')
    config.study.planes = ('singleadv', 'ensemble2adv')
    config.study.audit = False
    config.study.members = False
    config.epsilon = 0.15
    config.data.name = 'digits'
    config.data.pad = 1
    config.model.depth = 10
    config.model.width = 2
    config.train.steps = 600
    config.train.batch_size = 64
    config.train.learning_rate_steps = (400,)
    config.train.steps_per_call = 25
    config.train.log_every = 100
    config.train.checkpoint_every = 300
    config.train.snapshot_every = 300
    config.eval.attacks = ('clean', 'ifgsm5', 'pgd20')
    config.eval.long_attacks = ('pgd50', 'autoattack(examples=36)')
    config.eval.iterate_examples = 90
    config.blackbox.rounds = 3
    config.eval.batch_size = 180
    return config
