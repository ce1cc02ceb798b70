"""Any function from images to logits under attack, with the files of a run's evaluation.

Two ways lead here: `evaluate` from a program, and `run` from --mode=evaluate --model.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ensadv import build, config_checks, losses, values
from ensadv.attacks import registry
from ensadv.attacks.threat_model import ThreatModel
from ensadv.data import datasets
from ensadv.errors import ConfigError, UserError
from ensadv.evaluation import audit as audit_lib
from ensadv.evaluation import evaluate as evaluate_lib
from ensadv.evaluation.results import Results
from ensadv.models import functions
from ensadv.runtime import distributed
from ensadv.storage import audits, files, ledgers, selection, workdir

STEP = 0  # under which a model's results stand: nobody knows how long it was trained
FOR_RANDOM = ('clean', 'blackbox', 'autoattack_rand')
_TRIED = 64  # images, the first, whose predictions tell the model from another
_TOLERANCE = 0.03  # of their largest margin: devices round differently
_CHUNK = 1000  # images that are looked at at a time


class Source(NamedTuple):
    """A model as it was given.

    Attributes:
      predict: see `functions.model`.
      function: its name.
      file: where it is from; None: from a program.
      digest: SHA-256 of the file.
    """

    predict: Callable[..., Any]
    function: str
    file: str | None = None
    digest: str | None = None

    @property
    def name(self) -> str:
        """What errors call it."""
        return f'--model={self.file}:{self.function}' if self.file else self.function


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What attacks did to a model; str() is a table.

    Attributes:
      results: by attack, as eval/0.json has them; in a workdir those of earlier calls too.
      correct: by attack, bool [n]: the image was attacked, and stands.
      margin: by attack, float32 [n]: the lowest that was seen.
      workdir: where they are kept; None: nowhere.
      audit: what an audit found, as eval/0_audit.json has it; None: none was asked for.
    """

    results: Mapping[str, Mapping[str, Any]]
    correct: Mapping[str, np.ndarray]
    margin: Mapping[str, np.ndarray]
    workdir: str | None
    audit: Mapping[str, Any] | None = None

    @property
    def accuracy(self) -> dict[str, float]:
        """By attack, in [0, 1]."""
        return {name: result['accuracy'] for name, result in self.results.items()}

    @property
    def robust(self) -> np.ndarray:
        """bool [n]: nothing fooled the image, and some attack really attacked it.

        Of attacks on fewer images than others, on those that all were made on.
        """
        ledger = {f'{key}_margin': margin for key, margin in self.margin.items()}
        ledger |= {f'{key}_correct': correct for key, correct in self.correct.items()}
        found = ledgers.robust_examples(list(self.results.values()), ledger)
        return self.correct['clean'] if found is None else found

    @property
    def robust_accuracy(self) -> float:
        """The share of `robust`."""
        return float(np.mean(self.robust))

    @property
    def _attacks(self) -> list[str]:
        named = {key: result['name'] for key, result in self.results.items()}
        return [key for key, name in named.items() if name not in registry.WITHOUT_SETTINGS]

    def __str__(self) -> str:
        robust = {'robust': self.robust} if self._attacks else {}
        found = {**robust, **self.correct}
        width = max(map(len, found))
        rows = [f'{"attack".ljust(width)}  accuracy  correct']
        rows += [
            f'{name.ljust(width)}  {100 * np.mean(each):6.2f} %  {np.sum(each):,} of {len(each):,}'
            for name, each in found.items()
        ]
        rows[1] += ', under all of these' if robust else ''
        ignored = {name: r['no_gradient'] for name, r in self.results.items() if r['no_gradient']}
        rows += [
            f'{name}: {count:,} images stand only because no gradient was found; they are not '
            'counted as correct'
            for name, count in ignored.items()
        ]
        if self.audit:
            failed = [c for c in self.audit['checks'] if c['verdict'] == audits.FAILED]
            rows += [f'audit of {self.audit["n"]:,} images: {audits.verdict(self.audit)}']
            rows += [f'  {c["name"]}: {c["evidence"]} {c["remedy"]}' for c in failed]
        return '\n'.join(rows)


def evaluate(
    predict: Callable[..., Any],
    images: Any,
    labels: Any,
    threat_model: ThreatModel,
    attacks: str | Sequence[str] = 'autoattack',
    *,
    workdir: str | None = None,
    name: str | None = None,
    seed: int = 0,
    batch_size: int = 500,
    audit: int = 0,
) -> Evaluation:
    """Attacks any JAX function from images to logits, and returns the verdict on every image.

    Args:
      predict: images float32 [B, H, W, C] in [0, 1] -> logits, or log-probabilities, [B, classes],
        for any B; or of images and a key, for a random model (`functions.model`).
      images: uint8 [n, H, W, C]; or floats that are multiples of 1/255.
      labels: int [n], 0..classes - 1.
      threat_model: as ThreatModel('linf', 8 / 255).
      attacks: one or several, as eval.attacks has them: 'pgd20', 'autoattack',
        'autoattack_short(queries=100)'. The clean images are always evaluated too.
      workdir: keeps the results as a run's does. The same call goes on where a killed one stopped,
        and other attacks are added. None: nothing is kept.
      name: what the report calls the model; None: the function's name.
      seed: of the attacks, and of a random model's draws.
      batch_size: images at a time over all devices; alters only rounding.
      audit: of so many images, the first, that checks whether the results can be believed; 0: none.

    Raises:
      UserError: for what cannot be meant, in one line; and if the workdir is another model's.
      StorageError: if the workdir cannot be written.
    """
    if jax.process_count() > 1:
        raise UserError('ensadv.evaluate runs in one process; on several --mode=evaluate does')
    source = Source(predict, getattr(predict, '__name__', type(predict).__name__))
    config = _config(threat_model, attacks, name or source.function, seed, batch_size, audit)
    images = _as_bytes(images)
    model = _model(source, images.shape[1:], config)
    labels = _as_labels(labels, len(images), model.num_classes)
    dataset = datasets.Dataset('arrays', images[:0], labels[:0], images, labels, model.num_classes)
    with contextlib.ExitStack() as stack:
        folder = workdir or stack.enter_context(tempfile.TemporaryDirectory(prefix='ensadv'))
        path = files.absolute(str(folder))
        _evaluate(config, path, source, model, dataset)
        content = _audit(config, path, model, dataset) if audit else None
        return dataclasses.replace(_read(path, workdir and str(path)), audit=content)


def run(config: ConfigDict, workdir_path: epath.Path, source: Source) -> None:
    """Evaluates a model on a config's data, and prints the results.

    Args:
      config: of the command line, of which only data, threat model and evaluation count.
      workdir_path: the model's.
      source: the model.

    Raises:
      UserError: for what cannot be meant; and if the workdir is another model's.
    """
    config, model, dataset = open_model(config, source)
    _evaluate(config, workdir_path, source, model, dataset)
    evaluate_lib.show(workdir_path)


def audit_model(config: ConfigDict, workdir_path: epath.Path, source: Source) -> dict[str, Any]:
    """Audits what a workdir has of a model; see `audit.of`.

    Args, raises:
      As `run`.
    """
    config, model, dataset = open_model(config, source)
    _check_workdir(config, workdir_path, source, model, dataset)
    return _audit(config, workdir_path, model, dataset)


def _audit(config, path, model, dataset) -> dict[str, Any]:
    variables = distributed.replicate(list(model.weights))
    split = build.test_split(config, dataset)
    places = build.test_places(config, len(dataset.label_test))
    return audit_lib.audit_network(config, path, model.network, variables, STEP, split, places)


def open_model(
    config: ConfigDict, source: Source
) -> tuple[ConfigDict, functions.Model, datasets.Dataset]:
    """Returns what of a config counts for a model, the model, and the config's data.

    Args:
      config: validated.
      source: the model.

    Raises:
      UserError: if the model is none, or not of these data.
    """
    if config.ensemble.get('members_from') or config.eval.get('follow'):
        raise ConfigError('ensemble.members_from, eval.follow: not with --model')
    found = config.copy_and_resolve_references().to_dict()
    fields = 'system', 'seed', 'device', 'norm', 'epsilon', 'eval', 'audit'
    kept = {field: found[field] for field in fields}
    if kept['system'] == 'custom':
        kept['system'] = f'{epath.Path(source.file).stem}:{source.function}'
    kept['eval']['select_on'] = 'test'
    fields = 'name', 'data_dir', 'path', 'download', 'validation_examples'
    kept['data'] = {field: found['data'][field] for field in fields}
    config = ConfigDict({**kept, 'ensemble': {'combine': 'logits', 'size': 1}})
    distributed.check_same('--model', [source.function, source.digest])
    dataset = build.dataset(config)
    model = _model(source, dataset.image_shape, config)
    if model.num_classes != dataset.num_classes:
        raise UserError(
            f'{source.name}: expected logits of the {dataset.num_classes} classes of '
            f'{dataset.name}, found {model.num_classes}'
        )
    return config, model, dataset


def _config(threat_model, attacks, name, seed, batch_size, audit) -> ConfigDict:
    """Returns what evaluation and config.json need of a config, for arguments of `evaluate`."""
    if not isinstance(threat_model, ThreatModel):
        raise UserError(
            "threat_model: expected one, as ensadv.ThreatModel('linf', 8 / 255), found "
            f'{type(threat_model).__name__}'
        )
    if not isinstance(name, str) or not name.isprintable() or not 1 <= len(name) <= 100:
        raise UserError('name: expected 1 to 100 printable characters')
    texts = (attacks,) if isinstance(attacks, str) else tuple(attacks)
    config = ConfigDict(
        {
            'system': name,
            'seed': seed,
            'norm': threat_model.norm,
            'epsilon': float(threat_model.epsilon),
            'data': {'name': 'arrays'},
            'ensemble': {'combine': 'logits', 'size': 1},
            'eval': {
                'attacks': ('clean', *(text for text in texts if text != 'clean')),
                'long_attacks': (),
                'seed': seed,
                'batch_size': batch_size,
                'num_examples': None,
                'indices': None,
                'examples': 0,
                'blackbox_path': None,
                'select_on': 'test',
                'dtype': 'float32',
            },
            'audit': {'examples': audit},
        }
    )
    values.check_integer('seed', seed, 0)
    values.check_integer('batch_size', batch_size, 1)
    values.check_integer('audit', audit, 0)
    names = [
        config_checks.checked_entry(config, 'attacks', text).name for text in config.eval.attacks
    ]
    if 'blackbox' in names or len(set(names)) != len(names):
        raise UserError(f'attacks: expected each once, and not blackbox, found {list(texts)}')
    return config


def _model(source: Source, image_shape: Sequence[int], config: ConfigDict) -> functions.Model:
    model = functions.model(source.predict, tuple(image_shape), seed=config.seed, name=source.name)
    texts = *config.eval.attacks, *config.eval.long_attacks
    kinds = dict.fromkeys(registry.entry(text).kind for text in texts)
    others = [kind for kind in kinds if kind not in FOR_RANDOM]
    if model.is_random and others:
        raise UserError(
            f'{source.name} takes a key, and so is random, where {", ".join(others)} would count '
            'a lucky draw among many as a success; expected clean and autoattack_rand alone'
        )
    return model


def _as_bytes(images: Any) -> np.ndarray:
    """Returns images as uint8 [n, H, W, C]."""
    images = np.asarray(images)
    found = f'found {images.dtype} {list(images.shape)}'
    if images.ndim != 4 or not images.size:
        raise UserError(f'images: expected uint8 [n, H, W, C], {found}')
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise UserError(f"images: expected uint8, {found}; images.astype('uint8') makes them that")
    result = np.empty(images.shape, np.uint8)
    for first in range(0, len(images), _CHUNK):
        levels = images[first : first + _CHUNK].astype(np.float64) * 255
        whole = np.round(levels)
        if not np.all(np.abs(levels - whole) < 1e-3) or whole.min() < 0 or whole.max() > 255:
            low, high = levels.min() / 255, levels.max() / 255
            raise UserError(
                'images: expected uint8, or floats in [0, 1] that are multiples of 1/255, found '
                f"others, from {low:.4g} to {high:.4g}. (255 * images).round().astype('uint8') "
                'rounds pixels in [0, 1]; standardise in the function'
            )
        result[first : first + _CHUNK] = whole
    return result


def _as_labels(labels: Any, n: int, classes: int) -> np.ndarray:
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (n,):
        raise UserError(
            f'labels: expected integers [{n}], one for each image, found {labels.dtype} '
            f'{list(labels.shape)}'
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f'labels: expected 0..{classes - 1}, since the function gives {classes} logits, found '
            f'{labels.min()}..{labels.max()}'
        )
    return labels.astype(np.int32)


def _evaluate(
    config: ConfigDict,
    path: epath.Path,
    source: Source,
    model: functions.Model,
    dataset: datasets.Dataset,
) -> None:
    """Evaluates what a workdir lacks."""
    facts = _check_workdir(config, path, source, model, dataset)
    results = Results(config, path, config.system, lambda _: model.network, dataset)
    variables = distributed.replicate(list(model.weights))
    evaluate_lib.evaluate_once(config, path, results, STEP, facts, variables)


def _check_workdir(
    config: ConfigDict,
    path: epath.Path,
    source: Source,
    model: functions.Model,
    dataset: datasets.Dataset,
) -> dict[str, Any]:
    """Refuses what is not a workdir of this model, or a new one; returns its facts."""
    workdir.check_config(path, config)
    description = build.describe_data(config, dataset)
    workdir.check_data(path, description)
    margins = _first_margins(source, model, dataset)
    _check_same_model(path, source, margins)
    return {
        'dataset': description,
        'model': {
            'function': source.function,
            'file': source.file,
            'digest': source.digest,
            'margins': margins,
        },
    }


def _first_margins(
    source: Source, model: functions.Model, dataset: datasets.Dataset
) -> list[float]:
    """Returns the margins of the first test images.

    Raises:
      UserError: if what the model returns for them can be no logits.
    """
    images = dataset.image_test[:_TRIED].astype(np.float32) / 255
    labels = dataset.label_test[:_TRIED]
    logits = jax.jit(model.network.member_logits)(list(model.weights), images)[0]
    rows = np.asarray(logits, np.float64)
    if not np.all(np.isfinite(rows)):
        count = int(np.sum(~np.all(np.isfinite(rows), axis=1)))
        raise UserError(
            f'{source.name}: returns NaN or infinity for {count} of the first {len(rows)} images; '
            'expected finite logits'
        )
    if np.all(rows >= 0) and np.allclose(rows.sum(axis=1), 1, atol=1e-3):
        raise UserError(
            f'{source.name}: returns probabilities, which hide gradients; expected logits or '
            'log-probabilities'
        )
    return [round(float(margin), 6) for margin in losses.margin(logits, labels)]


def _check_same_model(path: epath.Path, source: Source, margins: Sequence[float]) -> None:
    """Refuses a workdir whose results are another model's, as far as that is known."""
    record = workdir.read_record(path)
    if record is None:
        return
    before = record['model']
    where = f'--workdir={path}'
    if source.digest != before['digest']:
        raise UserError(
            f'{where}: belongs to {before["file"] or "ensadv.evaluate"}:{before["function"]}, and '
            'the file is another one now (another digest); use another workdir'
        )
    tolerance = _TOLERANCE * np.max(np.abs(before['margins'])) + 1e-6
    found = np.asarray(before['margins'])
    if len(found) != len(margins) or np.max(np.abs(found - margins)) > tolerance:
        raise UserError(
            f'{where}: belongs to a model that predicts otherwise on the first {len(found)} images '
            f'than {source.name} does now; use another workdir'
        )


def _read(path: epath.Path, kept: str | None) -> Evaluation:
    """Returns all that a workdir has."""
    content = workdir.read_evaluations(path)[STEP]
    ledger = workdir.read_ledger(workdir.evaluation_path(path, STEP, '.npz'))
    results = {selection.ledger_key(result): result for result in content['attacks']}
    return Evaluation(
        results,
        {key: ledger[f'{key}_correct'] for key in results},
        {key: ledger[f'{key}_margin'] for key in results},
        kept,
    )
