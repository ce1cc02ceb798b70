"""The planes job: decisions of two runs, or of a run's members, on planes, for Figures 3 and 4."""

import itertools
import json
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from ensadv import build
from ensadv import config as config_lib
from ensadv.attacks.threat_model import ThreatModel
from ensadv.data import datasets
from ensadv.errors import UserError
from ensadv.evaluation import attack_settings, finished_runs, planes
from ensadv.evaluation.evaluator import Evaluator
from ensadv.runtime import distributed
from ensadv.storage import files, plane_files, workdir
from ensadv.storage.plane_files import Planes

# Of the record: what decides the planes, beside the weights.
_DECISIVE = (
    'attack', 'settings', 'places', 'window', 'resolution', 'dtype', 'fingerprint', 'members',
)  # fmt: skip
_CHOSEN = 3  # images, where the config names none, as in the paper


class Model(NamedTuple):
    """Something that predicts: a run's ensemble, or one of its members."""

    name: str
    evaluator: Evaluator
    variables: Any


class Row(NamedTuple):
    """Whose decisions are known: a model, or one of its members.

    Attributes:
      name, member, clean: see `Planes`.
      model: the number of the model.
    """

    name: str
    member: int
    clean: bool
    model: int


def run(config: ConfigDict, path: epath.Path) -> epath.Path:
    """Makes the decision planes of a run and a second one, or of its members.

    Each of two runs is attacked as the ensemble it is, and so is each member by itself. The file
    is planes/<name>.npz of the run, where <name> is 'members' or made of both workdirs' names; with
    other settings or images than those that are there a number follows. What is there already, of
    the same snapshots and settings, is not made again.

    Args:
      config: the run's, with what is asked for in config.planes.
      path: the run's workdir.

    Returns:
      The path of the .npz.

    Raises:
      UserError: if there is no finished run, the two are not of the same data and epsilon, an
        image is not there, or a run with one member is to be compared with nothing.
    """
    pair = _find(config, path)
    wanted = _record(config, pair)
    name = 'members' if len(pair) == 1 else '-'.join(run.path.name for run in pair)
    number = distributed.agree(
        _number(path / 'planes', name, wanted) if distributed.is_main() else None
    )
    file = _path(path / 'planes', name, number)
    made = _made_before(file, wanted) if distributed.is_main() else None
    if distributed.agree(made is None):
        made = _make(config, pair, wanted)
        if distributed.is_main():
            plane_files.write(file, made)
    else:
        logging.info('%s: made already, of the same snapshots and settings', file)
    return file


def _find(config: ConfigDict, path: epath.Path) -> list[finished_runs.Run]:
    """Returns the run, and the second one if there is one, once they are known to fit."""
    first = _find_run(path, '--workdir', config)
    workdir.check_config(path, config, ignore=('model.dtype',))
    if not config.epsilon:
        raise UserError('epsilon: expected a number > 0, found 0: no attack, and so no plane')
    num_test = first.record['dataset']['num_test']
    if (place := max(config.planes.images, default=0)) >= num_test:
        raise UserError(
            f'planes.images: expected places in the test split, 0..{num_test - 1}, found {place}'
        )
    if config.planes.other is None:
        if first.config.ensemble.size < 2:
            raise UserError(
                f'planes.other: needed for {path}, a run with one member: the workdir of a second '
                'run; only a run with members 1 and 2 can do without'
            )
        return [first]
    other = files.absolute(config.planes.other)
    second = _find_run(other, 'planes.other', config)
    if other == path:
        raise UserError(f'planes.other: expected another run than --workdir, found {other}')
    if first.record['dataset']['fingerprint'] != second.record['dataset']['fingerprint']:
        raise UserError(
            f'planes.other: {other}: expected a run on the same data as {path}, found '
            f'{second.record["dataset"]["name"]} with another fingerprint'
        )
    norms = config.norm, second.config.norm
    if norms[0] != norms[1]:
        raise UserError(
            f'planes.other: {other}: expected a run of the same norm as {path}, {norms[0]}, found '
            f'{norms[1]}'
        )
    if not math.isclose(second.config.epsilon, config.epsilon, rel_tol=1e-6):
        raise UserError(
            f'planes.other: {other}: expected a run of the same epsilon as {path}, '
            f'{config.epsilon:.6g}, found {second.config.epsilon:.6g}'
        )
    return [first, second]


def _find_run(path: epath.Path, field: str, config: ConfigDict) -> finished_runs.Run:
    record = workdir.read_record(path)
    if record and 'members' in record:
        raise UserError(
            f'{field}: {path}: is an ensemble of runs, which has no snapshot of its own; expected '
            'a run'
        )
    return finished_runs.find(path, field, config)


def _record(config: ConfigDict, pair: Sequence[finished_runs.Run]) -> dict[str, Any]:
    """Returns what the file says of how it was made, as JSON has it."""
    settings = attack_settings.evaluation_settings(config, config.planes.attack)
    # Each model's own, of the long attack's packing, and of examples that do not matter here.
    for name in ('combine', 'dtype', 'iterate_examples', 'indices'):
        settings.pop(name, None)
    dataset = pair[0].record['dataset']
    record = {
        **ThreatModel.of(config).to_json(),
        'attack': config.planes.attack,
        'settings': settings,
        'places': list(config.planes.images),
        'window': float(config.planes.window),
        'resolution': config.planes.resolution,
        'dtype': config.eval.dtype,
        'members': len(pair) == 1,
        'runs': [run.describe() for run in pair],
        'dataset': dataset['name'],
        'fingerprint': dataset['fingerprint'],
        'num_classes': dataset['num_classes'],
        'class_names': dataset.get('class_names'),  # older runs have none
        **build.environment(),
        'command': sys.argv,
    }
    return json.loads(json.dumps(record))


def _path(folder: epath.Path, name: str, number: int) -> epath.Path:
    return folder / (f'{name}.npz' if number == 1 else f'{name}_{number}.npz')


def _number(folder: epath.Path, name: str, wanted: dict[str, Any]) -> int:
    """Returns the number of the first file that is not there, or has no planes of other settings.

    Those of other snapshots, from before the run went on, give their place.
    """
    for number in itertools.count(1):
        try:
            found = plane_files.read(_path(folder, name, number)).record
        except UserError:  # not there, or damaged
            return number
        if all(found.get(field) == wanted[field] for field in _DECISIVE):
            return number


def _made_before(file: epath.Path, wanted: dict[str, Any]) -> Planes | None:
    """Returns the planes of the file, if they are of the same snapshots as would be made."""
    if not file.exists():
        return None
    try:
        made = plane_files.read(file)
    except UserError as error:
        logging.warning('%s; it is made anew', error)
        return None
    found = made.record
    same = [
        old['step'] == new['step'] and not config_lib.changed_fields(old['config'], new['config'])
        for old, new in zip(found['runs'], wanted['runs'], strict=True)
    ]
    return made if all(same) else None


def _make(config: ConfigDict, pair: Sequence[finished_runs.Run], record: dict[str, Any]) -> Planes:
    dataset = build.dataset(config)
    workdir.check_data(pair[0].path, dataset.describe())
    distributed.check_same('the data', dataset.fingerprint)
    distributed.tell(f'decision planes: attack {build.computation(config, config.eval.dtype)}')
    attacked, models, rows = _models(config, pair)
    places, saturated = _images(config, dataset)
    spanned, images, labels = _span(config, dataset, places, attacked, record['settings'])
    window, resolution = config.planes.window, config.planes.resolution
    classes, margins, point_classes = classify(models, rows, spanned, images, labels, window,
                                               resolution)  # fmt: skip
    origins, coordinates = images / np.float32(255), planes.grid(window, resolution)
    corners = max(len(plane.corners) for plane, _ in spanned)
    return Planes(
        names=tuple(row.name for row in rows),
        member=np.array([row.member for row in rows], np.int32),
        clean=np.array([row.clean for row in rows]),
        attacked=tuple(model.name for model in attacked),
        places=places,
        saturated=saturated,
        labels=labels,
        images=images,
        window=np.array(window, np.float32),
        classes=classes,
        margins=margins,
        inside=np.stack(
            [
                planes.inside(origin, plane.axes, coordinates)
                for origin, (plane, _) in zip(origins, spanned, strict=True)
            ]
        ),
        points=np.stack([plane.points for plane, _ in spanned]).astype(np.float32),
        point_classes=point_classes,
        region=np.stack(
            [
                np.pad(
                    plane.corners.astype(np.float32),
                    ((0, corners - len(plane.corners)), (0, 0)),
                    constant_values=np.nan,
                )
                for plane, _ in spanned
            ]
        ),
        notes=tuple(plane.note for plane, _ in spanned),
        record=record,
    )


def _images(config: ConfigDict, dataset: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Returns the places of the images, as given or chosen, and of each the saturated values."""
    images, _ = dataset.split('test')
    threat, places = ThreatModel.of(config), np.array(config.planes.images, np.int32)
    if len(places):
        return places, planes.saturated(images[places], threat)
    numbers = planes.saturated(images, threat)
    places = np.argsort(numbers, kind='stable')[:_CHOSEN].astype(np.int32)  # the first of equals
    saturated = numbers[places]
    text = f'planes.images: test images {", ".join(map(str, places))}, '
    if saturated.any():
        counts = ', '.join(map(str, saturated))
        logging.warning(
            '%swhich of all have the fewest saturated pixel values (%s of %d): parts of what is '
            'within epsilon of them are no images', text, counts, images[0].size,
        )  # fmt: skip
    else:
        distributed.tell(f'{text}the first without saturated pixel values')
    return places, saturated


def _models(
    config: ConfigDict, pair: Sequence[finished_runs.Run]
) -> tuple[list[Model], list[Model], list[Row]]:
    """Returns the two models that are attacked, those that predict, and whose regions are drawn."""
    ensembles = [_load(config, run) for run in pair]
    clean = [not run.config.train.adversarial_weight for run in pair]
    if len(ensembles) == 2:
        if ensembles[0].name == ensembles[1].name:
            ensembles = [
                model._replace(name=f'{model.name} ({which} run)')
                for which, model in zip(('first', 'second'), ensembles, strict=True)
            ]
        rows = []
        for i, (model, run) in enumerate(zip(ensembles, pair, strict=True)):
            rows.append(Row(model.name, 0, clean[i], i))
            if (k := run.config.ensemble.size) > 1:
                rows += [Row(f'{model.name}, member {j + 1}', j + 1, clean[i], i) for j in range(k)]
        return ensembles, ensembles, rows
    whole = ensembles[0]
    # The same functions, of weights with one member: the mean over it is its own prediction.
    members = [
        whole._replace(
            name=f'member {i + 1}',
            variables=distributed.replicate(
                jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], whole.variables)
            ),
        )
        for i in range(2)
    ]
    rows = [Row(f'member {i}', i, clean[0], 0) for i in (1, 2)]
    return members, ensembles, [*rows, Row(whole.name, 0, clean[0], 0)]


def _load(config: ConfigDict, run: finished_runs.Run) -> Model:
    network, variables = finished_runs.load_one(run, config.eval.dtype)
    name = f'{run.config.system}, seed {run.config.seed}'
    return Model(name, Evaluator(network, config.eval.batch_size), variables)


def _span(
    config: ConfigDict,
    dataset: datasets.Dataset,
    places: np.ndarray,
    attacked: Sequence[Model],
    settings: dict[str, Any],
) -> tuple[list[tuple[planes.Plane, np.ndarray]], np.ndarray, np.ndarray]:
    """Attacks both models on each image.

    Returns:
      Each image's plane with the three points that span it, float32 [3, H, W, C]; the images,
      uint8 [m, H, W, C]; their labels, int32 [m].
    """
    images, labels = dataset.split('test')
    adversarial = [
        # Few images, and a program of its own for them: far less than a whole batch of padding.
        Evaluator(model.evaluator.network, len(places)).points(
            model.variables, settings, images, labels,
            f'{model.name}: {config.planes.attack}', places=places,
        ).worst
        for model in attacked
    ]  # fmt: skip
    images, labels = images[places], labels[places]
    threat = ThreatModel.of(config)
    points = np.stack([images / np.float32(255), *adversarial], axis=1)
    spanned = [
        (planes.through(*three, threat, seed=int(place)), three)
        for three, place in zip(points, places, strict=True)
    ]
    return spanned, images, labels


def classify(
    models: Sequence[Model],
    rows: Sequence[Row],
    spanned: Sequence[tuple[planes.Plane, np.ndarray]],
    images: np.ndarray,
    labels: np.ndarray,
    window: float,
    resolution: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns what is predicted on each plane: `Planes.classes`, `.margins` and `.point_classes`.

    Args:
      models: predict, each with its members.
      rows: which of them.
      spanned: for each of m images its plane and the points that span it, [3, H, W, C] float32.
      images: uint8 [m, H, W, C].
      labels: int32 [m].
      window: see `Planes`.
      resolution: R, pixels along each side of the window.
    """
    m, size = len(images), resolution**2
    axes = np.stack([plane.axes for plane, _ in spanned])
    coordinates = np.tile(planes.grid(window, resolution).reshape(size, 2), (m, 1))
    samples = planes.Samples(
        images / np.float32(255), axes, np.repeat(np.arange(m), size), coordinates
    )
    points = np.concatenate([three for _, three in spanned])
    found, found_at_points = [], []
    for model in models:
        decide = model.evaluator.decisions
        found.append(
            decide(
                model.variables, samples, np.repeat(labels, size), f'{model.name}: decision planes'
            )
        )
        found_at_points.append(
            decide(
                model.variables, points, np.repeat(labels, 3), f'{model.name}: adversarial examples'
            )
        )
    square, three = (m, resolution, resolution), (m, 3)
    classes, margins, at_points = (
        np.stack([made[row.model][kind][:, row.member].reshape(shape) for row in rows], axis=1)
        for made, kind, shape in (
            (found, 0, square),
            (found, 1, square),
            (found_at_points, 0, three),
        )
    )
    return classes.astype(np.int16), margins.astype(np.float32), at_points.astype(np.int16)
