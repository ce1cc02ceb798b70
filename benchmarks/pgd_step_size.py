"""Which learning rate makes Adam-PGD strongest: its accuracy after 20 steps, lowest is best.

  python benchmarks/pgd_step_size.py --workdir=DIR [--n=1000]

DIR is a finished run. Evaluates its last snapshot with PGD20 at several rates, and with IFGSM20 for
comparison, on the first n test images, and prints a Markdown table. Nothing in DIR changes.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from etils import epath

from configs import default
from ensadv import build
from ensadv.evaluation import attack_settings, finished_runs
from ensadv.evaluation.evaluator import Evaluator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--workdir', required=True)
    parser.add_argument('--n', type=int, default=1000)
    args = parser.parse_args()
    path = epath.Path(pathlib.Path(args.workdir).absolute())
    found = finished_runs.find(path, '--workdir', default.get_config())
    run = found.config
    images, labels = (array[: args.n] for array in build.dataset(run).split('test'))
    network, variables = finished_runs.load([found], combine='probs', dtype='float32')
    evaluator = Evaluator(network, run.eval.batch_size)
    # DESIGN's 1/255, 2/255, 4/255 and 0.1 for epsilon = 8/255, in proportion.
    rates = {'eps/8': 1 / 8, 'eps/4': 1 / 4, 'eps/2': 1 / 2, '0.1 * 255/8 eps': 0.1 * 255 / 8}
    print(f'{run.system}, {run.data.name}, step {found.step}, epsilon {run.epsilon:.4g}, ', end='')
    print(f'n = {len(labels)}, seed {run.eval.seed}\n')
    print('| attack | rate | worst iterate % | last iterate % |\n| --- | --- | --: | --: |')
    for kind in ('pgd', 'ifgsm'):
        for name, factor in rates.items():
            run.eval[kind].step_size = min(factor * run.epsilon, 1.0)
            settings = attack_settings.evaluation_settings(run, f'{kind}20')
            label = f'{kind}20 {name}'
            verdicts = evaluator.evaluate(variables, settings, images, labels, label)
            accuracies = [f'{100 * (margin > 0).mean():.1f}' for margin in verdicts[:2]]
            print(f'| {kind}20 | {name} | {" | ".join(accuracies)} |', flush=True)


if __name__ == '__main__':
    main()
