"""SingleAdv on data of your own, in minutes on two CPU cores: a WRN-10-2, trained for 500 steps.

Reproduces: nothing of the paper's. It shows whether your data are read as you mean them, and what
  adversarial training changes on them; for numbers to publish train a system of the paper's size.
Run: python main.py --config=configs/small.py --config.data.name=npz --config.data.path=my.npz \
    --config.epsilon=8/255 --workdir=runs/small
  my.npz holds uint8 images, image_train and image_test, [n, height, width, channels], for example
  28x28x1 or 32x32x3, and their labels from 0, label_train and label_test, [n] (docs/data.md).
  If your images may not be mirrored, like letters, add --config.data.flip=False. If you have fewer
  than 300 test images, set --config.eval.num_examples. To train Ensemble2Adv as well and get one
  report on both, use the same command with --mode=study
  --config.study.systems=singleadv,ensemble2adv and another workdir.
Cost: 500 steps of 32 examples, 0.3 million parameters. For 32x32x3 images on two cores, by the
  table of docs/cpu.md: 3 minutes of training, 1 of evaluation, and compiling. This is arithmetic;
  nobody has measured it.
Expect: on CIFAR-10 (JPEG copy, shuffled; a third of an epoch), seed 0: 37 % clean and 22 % at
  PGD20, n = 300 (standard error about 3 points). Add more steps first.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.system = 'SingleAdv'
    config.model.depth = 10
    config.model.width = 2
    config.train.steps = 500
    config.train.batch_size = 32
    config.train.learning_rate_steps = (350, 450)
    config.train.log_every = 50
    config.train.checkpoint_every = 250
    config.train.snapshot_every = 250
    config.eval.attacks = ('clean', 'ifgsm7', 'pgd20')
    config.eval.long_attacks = ('pgd50',)
    config.eval.iterate_examples = 50
    config.eval.num_examples = 300
    config.eval.batch_size = 100
    return config
