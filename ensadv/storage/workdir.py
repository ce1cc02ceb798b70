"""The files of a run's workdir, except weights: config.json and eval/<step>.json, .npz."""

import contextlib
import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ensadv import config as config_lib
from ensadv.errors import ConfigError, UserError
from ensadv.storage import files, records

# In the workdir of a run whose averaged weights eval/ is of: config.json and eval/ of the trained.
TRAINED = 'trained'
_MOST_FOLDERS = 500  # that are looked at for the names of runs


def read_ledger(path: epath.Path) -> dict[str, np.ndarray]:
    """Reads eval/<step>.npz as a user names it.

    Raises:
      UserError: if it is missing, damaged or no ledger.
    """
    if not path.exists():
        raise UserError(f'{path}: found no such file, expected eval/<step>.npz of a run')
    try:
        ledger = files.read_arrays(path)
    except Exception as error:  # whatever storage, zipfile and NumPy raise
        raise UserError(f'{path}: expected an undamaged .npz of plain arrays ({error})') from error
    if 'label' not in ledger:
        raise UserError(f'{path}: expected a ledger, found no array label in it')
    return ledger


def read_record(workdir: epath.Path) -> dict[str, Any] | None:
    """Returns config.json's content ('config', 'dataset', ...), or None where there is none.

    Where the workdir has moved since it was written, what moved with it is named at its new place.

    Raises:
      UserError: if it is damaged, or not a run's.
    """
    path = workdir / 'config.json'
    if not path.exists():
        return None
    record = files.read_json(path)
    if reason := records.run_mismatch(record):
        raise UserError(f'{path}: not the config.json of a run ({reason})')
    _follow_moves(record, workdir)
    return record


def _follow_moves(record: dict[str, Any], workdir: epath.Path) -> None:
    """Corrects a record's paths of what has the same place relative to the run as it had before."""
    config, sessions = record['config'], record['sessions']
    before = sessions[-1].get('workdir') if sessions else None

    def now(path: str, beside: epath.Path) -> str:
        # What a study makes lies beside its runs, and so members of an ensemble may: that is all
        # that is known where an older version wrote the record.
        found = [path, _moved(path, str(beside), workdir.parent)]
        if before is not None:
            found.insert(0, _moved(path, before, workdir))
        return next((each for each in found if epath.Path(each).exists()), path)

    if before == str(workdir):
        return
    if path := config['eval']['blackbox_path']:
        config['eval']['blackbox_path'] = now(path, epath.Path(path).parent.parent)
    if paths := config['ensemble'].get('members_from'):
        paths = [now(path, epath.Path(path).parent) for path in paths.split(',')]
        config['ensemble']['members_from'] = ','.join(paths)
    for member in record.get('members', ()):
        path = member['workdir']
        member['workdir'] = now(path, epath.Path(path).parent)


def _moved(path: str, before: str, now: epath.Path) -> str:
    """Returns the path that is to `now` what another is to `before`."""
    parts, old = path.split('/'), before.split('/')
    pairs = enumerate(zip(parts, old, strict=False))
    shared = next((i for i, pair in pairs if pair[0] != pair[1]), min(len(parts), len(old)))
    for _ in old[shared:]:
        now = now.parent
    return str(now.joinpath(*parts[shared:]))


def no_run(path: epath.Path) -> str:
    """Returns what to tell where a run was expected at a path: that none is, and which are near."""
    if path.is_dir():
        below = _runs_below(path)
        found = f'; below it there are {_listed(below)}' if below else ''
        return f'no run is here (no config.json){found}'
    folder = next((parent for parent in path.parents if parent.is_dir()), None)
    near = _runs_below(folder) if folder is not None else []
    name = str(path.relative_to(folder)) if near else ''
    if close := difflib.get_close_matches(name, near, n=1):
        return f'no run is here (no such directory); did you mean {folder / close[0]}?'
    found = f'; in {folder} there are {_listed(near)}' if near else ''
    return f'no run is here (no such directory){found}'


def _runs_below(folder: epath.Path) -> list[str]:
    """Returns the names of runs in a directory, and in those in it, as far as they are few."""
    found, folders, left = [], [folder], _MOST_FOLDERS
    for depth in range(2):
        below = []
        for each in folders:
            with contextlib.suppress(OSError):  # where nothing may be read
                below += sorted(path for path in each.iterdir() if not path.name.startswith('.'))
        folders = []
        for path in below[: max(left, 0)]:
            with contextlib.suppress(OSError):
                if (path / 'config.json').exists():
                    found.append(path.relative_to(folder).as_posix())
                elif not depth and path.is_dir():
                    folders.append(path)
        left -= len(below)
    return found


def _listed(names: list[str]) -> str:
    more = f', and {len(names) - 8} more' if len(names) > 8 else ''
    return f'{", ".join(names[:8])}{more}'


def check_config(workdir: epath.Path, config: ConfigDict, ignore: tuple[str, ...] = ()) -> None:
    """Checks that a workdir is free, or that of a run with this config.

    Args:
      workdir: the run's.
      config: the run's resolved config.
      ignore: fields that may differ, beside `config.MUTABLE_FIELDS`.

    Raises:
      ConfigError: naming the fields that differ.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f'--workdir={workdir}: is a file, expected a directory')
    record = read_record(workdir)
    if record is not None:
        new = config_lib.to_dict(config)
        is_run = 'train' in new
        if is_run == ('model' in record):
            found = f'the model {record["model"]["function"]}' if is_run else 'a run'
            raise UserError(f'--workdir={workdir}: belongs to {found}; use another workdir')
        if changed := config_lib.changed_fields(record['config'], new, ignore):
            raise ConfigError(
                f'--workdir={workdir}: belongs to a run with another config '
                f'({"; ".join(changed)}); use that config or another workdir'
            )


def check_data(workdir: epath.Path, dataset: Mapping[str, Any]) -> None:
    """Checks that a workdir is free, or that of a run on these data.

    Args:
      workdir: the run's.
      dataset: as `build.describe_data` gives it; as `data.Dataset.describe` does if it makes no
        difference which test examples are evaluated. Only training compares its 'extra' images.

    Raises:
      UserError: if its run was made on data with another fingerprint, or on another part of them.
    """
    record = read_record(workdir)
    if record is None:
        return
    found = record['dataset']
    if found['fingerprint'] != dataset['fingerprint']:
        raise UserError(
            f'{workdir}: its run was made on other data than {found["name"]} holds now (another '
            'fingerprint)'
        )
    if found['num_train'] != dataset['num_train']:
        raise UserError(
            f'{workdir}: its run was trained on {found["num_train"]} examples, and '
            f'data.validation_examples leaves {dataset["num_train"]}: it may have seen what is '
            'held out here'
        )
    if 'extra' in dataset and found.get('extra') != dataset['extra']:
        raise UserError(
            f'{workdir}: its run was made with other extra images than data.extra names now '
            '(another fingerprint)'
        )
    # Of a run that is only a member of what is evaluated it makes no difference.
    if 'indices' in dataset and found.get('indices') != dataset['indices']:
        digests = (found.get('indices'), dataset['indices'])
        kept, given = (f'digest {digest:.8}...' if digest else 'none' for digest in digests)
        raise UserError(
            f'{workdir}: its run is evaluated on the test examples of another eval.indices '
            f'({kept}) than given now ({given}); use that file or another workdir'
        )


def write_record(
    workdir: epath.Path,
    config: ConfigDict | None,
    facts: Mapping[str, Any],
    session: Mapping[str, Any],
) -> None:
    """Writes config.json as a run begins or goes on.

    Args:
      workdir: the run's.
      config: its resolved config; None: the one that is there stays.
      facts: what stays true of the run, as its 'dataset'.
      session: what holds from now on: 'step', 'command' and `build.environment`.
        config.json has the list of all sessions.
    """
    record = read_record(workdir) or {'sessions': []}
    settings = record['config'] if config is None else config_lib.to_dict(config)
    # By it a run that has moved finds what has moved with it.
    session = {'workdir': str(workdir), **session}
    # Where its first weights came from stays true of it.
    kept = {'imported': record['imported']} if 'imported' in record else {}
    content = {'config': settings, **kept, **facts, 'sessions': [*record['sessions'], session]}
    files.write_json(workdir / 'config.json', content)


def add_to_session(workdir: epath.Path, facts: Mapping[str, Any]) -> None:
    """Adds to what config.json says of the session that is under way."""
    record = read_record(workdir)
    record['sessions'][-1] |= facts
    files.write_json(workdir / 'config.json', record)


def weights_folder(workdir: epath.Path, config: ConfigDict) -> epath.Path:
    """Returns where eval/ is of the weights that the config has evaluated.

    That is a run's workdir. The trained weights of a run whose averaged ones are evaluated there
    have a folder in it, with a config.json of its own.
    """
    is_other = config.train.ema_decay and config_lib.weights(config) == 'trained'
    return workdir / TRAINED if is_other else workdir


def evaluation_path(workdir: epath.Path, step: int, suffix: str) -> epath.Path:
    """Returns the path of eval/<step>.json or .npz."""
    return workdir / 'eval' / f'{step}{suffix}'


def write_examples(workdir: epath.Path, step: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes eval/<step>_examples.npz."""
    files.write_arrays(evaluation_path(workdir, step, '_examples.npz'), arrays)


def read_examples(workdir: epath.Path, step: int) -> dict[str, np.ndarray] | None:
    """Returns eval/<step>_examples.npz's content; None where there is none.

    Returns:
      'index' int32 [m], places in the test split (older files have the first ones, without it),
      'label' int32 [m], 'image' uint8 [m, H, W, C], 'adversarial' float32 [m, H, W, C],
      'clean_log_probs' and 'adversarial_log_probs' float32 [m, classes], and 'settings', the
      attack's, as JSON.
    """
    path = evaluation_path(workdir, step, '_examples.npz')
    return files.read_arrays(path) if path.exists() else None


def read_evaluations(workdir: epath.Path) -> dict[int, dict[str, Any]]:
    """Returns the content of every eval/<step>.json, by step, in order.

    Raises:
      UserError: if one is damaged.
    """
    steps = evaluated_steps(workdir)
    return {step: files.read_json(evaluation_path(workdir, step, '.json')) for step in steps}


def evaluated_steps(workdir: epath.Path) -> list[int]:
    """Returns the steps that have an eval/<step>.json, ascending."""
    folder = workdir / 'eval'
    if not folder.exists():
        return []
    # Not by glob, for which a [ in the workdir's name would be a pattern.
    found = (path for path in folder.iterdir() if path.suffix == '.json' and path.stem.isdecimal())
    return sorted(int(path.stem) for path in found)
