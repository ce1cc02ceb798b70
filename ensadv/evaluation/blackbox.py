"""The black-box job: trains the sources, attacks them, and writes the transfer set."""

import functools
import sys
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from ensadv import build, systems
from ensadv import config as config_lib
from ensadv.attacks import registry
from ensadv.attacks.threat_model import ThreatModel
from ensadv.errors import ConfigError, TrainingError, UserError
from ensadv.evaluation import finished_runs, transfer_sets
from ensadv.evaluation.evaluator import Evaluator
from ensadv.runtime import distributed
from ensadv.storage import workdir

FILE = 'blackbox.npz'


def make(
    config: ConfigDict, root: epath.Path, systems_dir: epath.Path, run_one: systems.RunOne
) -> epath.Path:
    """Makes the transfer set root/blackbox.npz, unless it is there, and returns its path.

    Its sources are runs in root/<source>_seed<seed>, trained by `run_one` as any other. They are
    combined by the mean of their logits, as in the paper.

    Args:
      config: with its references unresolved; config.blackbox tells what to make.
      root: the directory.
      systems_dir: configs/.
      run_one: trains and evaluates one run to its end, at once if it is there already.

    Raises:
      UserError: if root has a transfer set that was made otherwise.
    """
    configs = source_configs(config, systems_dir)
    config = config.copy_and_resolve_references()
    made_by = {
        'combine': 'logits',
        'dtype': config.eval.dtype,
        'num_examples': config.eval.num_examples,
        'rounds': _rounds(config),
    }
    if digest := build.indices_digest(config):
        made_by['indices'] = digest
    path = root / FILE
    if distributed.agree(path.exists()):
        record = transfer_sets.read_record(path)
        _check_made_alike(path, record, made_by, list(configs.values()))
    else:
        for number, (name, run_config) in enumerate(configs.items(), start=1):
            run_one(run_config, root / name, f'[source {number}/{len(configs)}] {name}')
        sources = [finished_runs.find(root / name, 'blackbox.sources', config) for name in configs]
        record = _make(config, sources, made_by, path)
        distributed.check_shared(path)
    if distributed.is_main():
        print(_summary(path, record))
    return path


def source_configs(config: ConfigDict, systems_dir: epath.Path) -> dict[str, ConfigDict]:
    """Returns the sources' configs by the names of their directories.

    Raises:
      ConfigError: if a source is no system, or not trained cleanly.
    """
    configs = {}
    for name in config.blackbox.sources:
        seed = config.blackbox.seed
        run_config = systems.make_config(config, name, seed, 'blackbox.sources', systems_dir)
        if run_config.train.adversarial_weight:
            raise ConfigError(
                f'blackbox.sources: {name} is trained adversarially; expected systems with '
                'train.adversarial_weight=0'
            )
        # Their last weights, and how good they are, is all that is asked of them.
        run_config.train.snapshot_every = run_config.train.steps
        run_config.eval.attacks, run_config.eval.long_attacks = ('clean',), ()
        run_config.eval.blackbox_path = None
        run_config.eval.select_on = 'test'
        configs[systems.run_name(name, seed)] = run_config
    return configs


def _rounds(config: ConfigDict) -> list[dict[str, Any]]:
    """Returns the attacks' settings: the paper's, then ever more on whichever source stands."""
    group = config.blackbox
    restarts = registry.starts_differ(group.start, group.sigma)
    return [
        {
            'attack': 'pgd',
            **ThreatModel.of(config).to_json(),
            'steps': group.steps * 2**number,
            'step_size': group.step_size,
            # With steps of one size a few stay between two sources that take turns.
            'schedule': 'cosine' if number else 'constant',
            'start': group.start,
            'sigma': group.sigma,
            'restarts': number + 1 if restarts else 1,
            'loss': 'best_margin' if number else 'mean_logits',
            'seed': group.seed + number,
        }
        for number in range(group.rounds)
    ]


def _check_made_alike(
    path: epath.Path,
    record: dict[str, Any],
    made_by: dict[str, Any],
    configs: list[ConfigDict],
) -> None:
    """Refuses a transfer set that these sources and settings would not have made."""
    found = [source['config'] for source in record['sources']]
    alike = record.get('made_by') == made_by and len(found) == len(configs)
    for stored, run_config in zip(found, configs, strict=False):
        wanted = config_lib.to_dict(run_config)
        alike = alike and not config_lib.changed_fields(stored, wanted, ignore=('model.dtype',))
    if not alike:
        raise UserError(f'{path}: was made from other sources or settings; use another workdir')


def _make(
    config: ConfigDict, sources: list[finished_runs.Run], made_by: dict[str, Any], path: epath.Path
) -> dict[str, Any]:
    """Attacks every test image until every source errs on it; process 0 writes the file."""
    dataset = build.dataset(config)
    for source in sources:
        workdir.check_data(source.path, dataset.describe())
    distributed.check_same('the data', dataset.fingerprint)
    images, labels = build.test_split(config, dataset)
    places = build.test_places(config, len(dataset.label_test))
    n = len(labels)
    network, variables = finished_runs.load(sources, combine='logits', dtype=config.eval.dtype)
    evaluator_of = functools.cache(lambda size: Evaluator(network, size))
    evaluator, threat = evaluator_of(config.eval.batch_size), ThreatModel.of(config)
    distributed.tell(f'transfer set: attack {build.computation(config, config.eval.dtype)}')

    judged = 'transfer set: the sources'

    def largest_margin(images: np.ndarray, places: np.ndarray) -> np.ndarray:
        """An example stands while any source is right."""
        margins = evaluator.member_margins(variables, images, labels[places], judged)
        return np.max(margins, axis=1)

    everything = np.arange(n)
    clean = evaluator.member_margins(variables, images, labels, judged)
    stored, margin = images.copy(), np.max(clean, axis=1)
    fooled_per_round = []
    for number, settings in enumerate(made_by['rounds']):
        # The first round takes all, also those that are errors without an attack.
        standing = np.flatnonzero(margin > 0) if number else everything
        if not len(standing):
            break
        label = f'transfer set, round {number + 1}: pgd{settings["steps"]}'
        # Few are left in the end: powers of two are few sizes to compile.
        size = min(config.eval.batch_size, 1 << (len(standing) - 1).bit_length())
        x_adv = (
            evaluator_of(size)
            .points(
                variables, settings, images, labels, label, places=standing, split_places=places
            )
            .worst
        )
        # Judged as they are stored: rounding to levels may undo an attack.
        candidates = transfer_sets.quantize(x_adv, images[standing], threat)
        found = largest_margin(candidates, standing)
        better = found < margin[standing]
        stored[standing[better]] = candidates[better]
        margin[standing[better]] = found[better]
        fooled_per_round.append(int(np.sum(margin <= 0)))
        logging.info('%s: %d of %d examples fool every source', label, fooled_per_round[-1], n)
    record = {
        **threat.to_json(),
        'dataset': dataset.name,
        'fingerprint': dataset.fingerprint,
        'sources': [
            source.describe()
            | {'workdir': source.path.name, 'clean_accuracy': float(np.mean(clean[:, i] > 0))}
            for i, source in enumerate(sources)
        ],
        'made_by': made_by,
        'fooled_per_round': fooled_per_round,
        **build.environment(),
        'command': sys.argv,
    }
    # In one go, as it is verified: in batches of other sizes the last digits differ.
    fooled = largest_margin(stored, everything) <= 0
    made = transfer_sets.TransferSet(stored, labels, places, fooled, record)
    unverified = path.with_name(f'.{FILE}')
    read = made
    if distributed.is_main():
        record = transfer_sets.write(unverified, made)
        read = transfer_sets.load(unverified, dataset, threat)
    if not np.array_equal(largest_margin(read.images, everything) <= 0, read.fooled):
        raise TrainingError(f'{unverified}: as stored it does not fool the sources as recorded')
    if distributed.is_main():
        unverified.replace(path)
    return record


def _summary(path: epath.Path, record: dict[str, Any]) -> str:
    sources = ', '.join(
        f'{source["system"]} ({100 * source["clean_accuracy"]:.1f} % clean)'
        for source in record['sources']
    )
    lines = [
        f'{path}: {record["n"]:,} adversarial examples of {record["dataset"]}, epsilon '
        f'{record["epsilon"]:.4g}, made against {sources}',
        f'{100 * record["share_fooled"]:.2f} % fool every source',
    ]
    if left := record['n'] - record['fooled']:
        lines.append(f'{left} never did, and are marked in its array fooled')
    return '; '.join(lines)
