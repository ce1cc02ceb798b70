"""The command line: flags, the config with its overrides, the log, and exit codes."""

import contextlib
import difflib
import linecache
import logging as python_logging
import operator
import os
import re
import shlex
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from ensadv import architectures, config_checks, flag_values, python_files, systems, values
from ensadv import config as config_lib
from ensadv.errors import ConfigError, StorageError, TrainingError, UserError, line_of
from ensadv.runtime import stopping, terminal
from ensadv.storage import files, tensor_files, workdir

# The modes, with what --help says of each.
MODES = {
    'train': 'train a system, and evaluate its snapshots on the way (the default)',
    'evaluate': 'evaluate the snapshots of a run, also with other attacks; or any --model',
    'study': 'train and evaluate several systems and seeds, and report on them',
    'audit': 'check whether the robust accuracy of a finished run can be believed',
    'members': "measure what the members of a finished run's ensemble do under attack",
    'blackbox': 'make a transfer set, the examples of the black-box attack',
    'compare': 'compare two ledgers, example by example',
    'report': 'write tables, figures and a page on all runs below --workdir',
    'planes': 'draw decision planes of two runs',
    'export': 'write a run as a folder that PyTorch alone can use',
    'import': 'make a run of the weights of a network in PyTorch',
    'describe': 'show the size, cost and memory of a config, without training',
}
WITHOUT_CONFIG = ('compare', 'report')
FOR_A_RUN = ('evaluate', 'audit', 'members', 'planes', 'export')  # need an existing run
EVALUATION_MODES = ('evaluate', 'audit', 'members')  # take a model, or members that are runs
_EVALUATION = f'{", ".join(EVALUATION_MODES[:-1])} or {EVALUATION_MODES[-1]}'
CONFIGS = epath.Path(__file__).parents[1] / 'configs'
EXAMPLE = 'python main.py --config=configs/small.py --config.data.name=digits --workdir=runs/small'
FLAGS = flags.FLAGS


class _ModeParser(flags.EnumParser):
    def parse(self, argument: str) -> str:
        if argument not in self.enum_values:
            hint = values.nearest(argument.lower(), self.enum_values)
            raise ValueError(f'expected one of {", ".join(self.enum_values)}{hint}')
        return argument


flag_values.register()
flags.DEFINE(_ModeParser(list(MODES)), 'mode', 'train', 'What to do.', flags.FLAGS)
flags.DEFINE_string(
    'config',
    None,
    'File of the config. --config.FIELD=VALUE sets a field. Default: the config of --workdir.',
)
flags.DEFINE_string('workdir', None, 'Directory of the run or study; may be on gs://.')
flags.DEFINE_string(
    'compilation_cache',
    None,
    'Directory that keeps compiled programs, for later starts; may be on gs://. Default: '
    "~/.cache/ensadv/compiled. '' keeps none. JAX_COMPILATION_CACHE_DIR goes before.",
)
flags.DEFINE_string(
    'model',
    None,
    'FILE.py:FUNCTION of a model to evaluate. The function takes images, float32 [B, H, W, C] in '
    '[0, 1], and returns logits; see docs/any_model.md. Default: that of --workdir.',
)
flags.DEFINE_list('ledgers', None, 'For --mode=compare: two files eval/<step>.npz.')

flags.DEFINE_string('to', None, 'For --mode=export: the folder that is written; may be on gs://.')
flags.DEFINE_string(
    'from',
    None,
    'For --mode=import: a file of weights, .safetensors, .npz or what torch.save wrote; see '
    'docs/exchange.md.',
)
flags.DEFINE_string(
    'architecture',
    None,
    'For --mode=import: the network, as WRN-28-10 or WRN-28-10-silu. Default: that of --config, or '
    'of an exported file.',
)

_OVERRIDE = re.compile(r'--?(?:no)?config\.([^=]*)')
_LONGEST_MESSAGE = 600
_FIELD_ACCESS = (ConfigDict.__getattr__.__code__, ConfigDict.__setattr__.__code__)
_POLL_SECONDS = 2  # between two looks for a run that has not begun


def fail(message: str, code: int = 2) -> NoReturn:
    """Ends the program with one line on stderr; `code` is 2 for mistakes and 1 for faults."""
    line = ' '.join(message.split())
    # Escape what a terminal would obey.
    line = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in line)
    if len(line) > _LONGEST_MESSAGE:
        # Keep the end, which often says what to do.
        line = f'{line[: _LONGEST_MESSAGE - 200]} ... {line[-195:]}'
    print(f'error: {line}', file=sys.stderr)
    sys.exit(code)


@contextlib.contextmanager
def error_exits() -> Iterator[None]:
    """Turns errors raised inside into one line and an exit code, see `fail`."""
    try:
        yield
    except (UserError, TrainingError, StorageError) as error:
        fail(str(error), code=error.exit_code)
    except ModuleNotFoundError as error:
        if (error.name or '').partition('.')[0] == 'ensadv':
            raise
        fail(f'a package is missing ({error}): pip install -r requirements.txt')
    except OSError as error:  # lost storage; --verbosity=1 shows the traceback
        logging.debug('', exc_info=True)
        fail(f'{error}. Everything on disk is whole: run the same command to go on', code=1)
    except stopping.Stopped as stopped:
        fail(str(stopped), code=stopped.exit_code)


def workdir_path(to_write: bool = False) -> epath.Path:
    """Returns --workdir, absolute.

    Args:
      to_write: whether the program will write there, and so must be allowed to.

    Raises:
      UserError: if it is missing, or is no directory and cannot become one.
    """
    if not FLAGS.workdir:
        meant = 'the directory that is written to, as --workdir=runs/1'
        if FLAGS.mode == 'report':
            meant = 'the directory whose runs are reported on'
        raise UserError(f'--workdir: needed, {meant}')
    path = files.absolute(FLAGS.workdir)
    if '://' not in FLAGS.workdir and (reason := _no_directory(path, to_write)):
        raise UserError(f'--workdir={FLAGS.workdir}: {reason}')
    return path


def folder_to_write() -> epath.Path:
    """Returns --to, absolute; raises UserError if it is missing."""
    if not FLAGS.to:
        raise UserError('--to: needed, the folder that is written, as --to=exported')
    return files.absolute(FLAGS.to)


def _no_directory(path: epath.Path, to_write: bool) -> str:
    """Returns why a local path is no directory and cannot become one; '' if it is or can."""
    for part in (path, *path.parents):
        try:
            found = os.stat(part)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            return f'cannot be a directory ({error.strerror})'
        if not stat.S_ISDIR(found.st_mode):
            return f'{"" if part == path else f"{part} "}is a file, expected a directory'
        if to_write and part != path and not os.access(part, os.W_OK | os.X_OK):
            return f'cannot be made: no permission to write in {part}'
        break
    return ''


def parse(argv: list[str], get_default: Callable[[], ConfigDict]) -> list[str]:
    """Parses the command line; a mistake ends the program with one line and exit code 2.

    Without --config the config is that of --workdir, so --workdir alone names an existing run.

    Args:
      argv: the command line.
      get_default: returns the config that has every field.

    Returns:
      The arguments that are left.
    """
    stopping.install()
    if {'--help', '-help', '-h'} & set(argv[1:]):
        print(help_text())
        sys.exit(0)
    try:
        # Otherwise the value in `--config.epsilon 8/255` would end the flags.
        FLAGS.set_gnu_getopt()
        rest = FLAGS(argv, known_only=True)
        overrides = [(arg, m[1]) for arg in rest[1:] if (m := _OVERRIDE.match(arg))]
        found = _without_overrides(get_default)
        if found is None and FLAGS.workdir and FLAGS.mode == 'evaluate':
            # Report mistakes in the overrides before waiting.
            _parse_overrides(rest, overrides, get_default())
            if not FLAGS.config.eval.follow:
                raise missing_config()
            _wait_for_run(FLAGS.config.eval.follow_timeout)
            for name in [name for name in FLAGS if name.partition('.')[0] == 'config']:
                delattr(FLAGS, name)
            found = _config_of_run(get_default)
        if found is not None:
            return _parse_overrides(rest, overrides, found)
        if overrides:
            raise missing_config(f' for {overrides[0][0]}')
        return FLAGS(rest)
    except flags.UnrecognizedFlagError as error:
        fail(f'{error}{_flag_hint(error.flagname, get_default())}')
    except flags.Error as error:
        fail(str(error))
    except (UserError, TrainingError):
        raise
    except Exception as error:  # ml_collections checks little
        fail(f'{" ".join(argv[1:])}: {type(error).__name__}: {error}')


def _parse_overrides(
    rest: list[str], overrides: Sequence[tuple[str, str]], found: ConfigDict
) -> list[str]:
    """Redefines --config as the config, applies the overrides, and returns the other arguments."""
    known = config_lib.field_types(found)
    for arg, field in overrides:
        if field not in known:
            hint = config_lib.nearest_field(field, known)
            raise ConfigError(f'{arg}: unknown config field {field}{hint}')
        # ml_collections would join two tuples; for other types the last value counts.
        if known[field] is tuple and sum(field == other for _, other in overrides) > 1:
            raise ConfigError(f'{arg}: {field} is given more than once')
    if 'config' in FLAGS:
        del FLAGS.config
    config_flags.DEFINE_config_dict('config', found, sys_argv=rest)
    return FLAGS(rest)


def _flag_hint(name: str, known: ConfigDict) -> str:
    """Returns advice on an unknown flag, which may be a config field without --config."""
    return config_lib.nearest_field(name, config_lib.field_types(known), '--config.')


def help_text() -> str:
    """Returns the text of --help: a first command, modes and flags."""
    width = max(map(len, MODES))
    modes = [f'  --mode={mode.ljust(width)}  {what}' for mode, what in MODES.items()]
    others = [flag for flag in FLAGS.flags_by_module_dict()[__name__] if flag.name != 'mode']
    shown = {flag.name: flag.help.partition('. ')[0].rstrip('.') for flag in others}
    shown |= {
        'config.FIELD=VALUE': 'Sets a field of the config',
        'helpfull': 'All flags, at length',
    }
    width = max(map(len, shown))
    shown = [f'  --{name.ljust(width)}  {text}' for name, text in shown.items()]
    return '\n'.join(
        [
            'Trains ensembles of image classifiers adversarially, and measures their robustness.',
            '',
            'A first run takes minutes, on images that come with scikit-learn:',
            f'  {EXAMPLE}',
            'On images of your own: see configs/small.py. All fields: configs/default.py.',
            '',
            *modes,
            '',
            *shown,
        ]
    )


def unexpected_argument(argument: str) -> UserError:
    """Returns the error for an argument that is no flag."""
    name = argument.partition('=')[0]
    if argument == 'help':
        meant = 'did you mean --help?'
    elif argument in MODES:
        meant = f'did you mean --mode={argument}?'
    elif argument.endswith('.py'):
        meant = f'did you mean --config={argument}?'
    elif '=' in argument:
        meant = f'did you mean --{"" if name.startswith("config.") else "config."}{argument}?'
    elif argument.lower() in ('true', 'false', 'yes', 'no'):
        meant = f'a field of True or False takes it after =, as --config.eval.inline={argument}'
    else:
        meant = 'flags begin with --'
    return UserError(f'unexpected argument {argument!r}; {meant}')


def missing_config(needed_for: str = '') -> UserError:
    """Returns the error for a command for which neither --config nor --workdir gives a config."""
    if FLAGS.mode in FOR_A_RUN:
        if not FLAGS.workdir:
            return UserError(
                f'--workdir: needed, that of a run, as in --mode={FLAGS.mode} --workdir=runs/small'
            )
        return UserError(f'--workdir={FLAGS.workdir}: {workdir.no_run(workdir_path())}')
    where = ''
    if FLAGS.workdir:
        where = f'; --workdir={FLAGS.workdir}: {workdir.no_run(workdir_path())}'
    command = EXAMPLE if FLAGS.mode == 'train' else '--config=configs/small.py'
    return ConfigError(
        f'--config: needed{needed_for}, as in {command}{where}; --help lists modes and flags'
    )


def _wait_for_run(seconds: float) -> None:
    """Waits until training has begun in --workdir.

    Raises:
      TrainingError: if it has not begun after so many seconds.
    """
    path = workdir_path()
    print(
        f'{path}: waiting until training begins here (no config.json yet), {seconds:g} s at most '
        '(eval.follow_timeout)', file=sys.stderr, flush=True,
    )  # fmt: skip
    end = time.monotonic() + seconds
    while not (path / 'config.json').exists():
        if time.monotonic() > end:
            raise TrainingError(
                f'--workdir={FLAGS.workdir}: no training began here in {seconds:g} s '
                f'(eval.follow_timeout): {workdir.no_run(path)}'
            )
        time.sleep(min(_POLL_SECONDS, seconds))


def _without_overrides(get_default: Callable[[], ConfigDict]) -> ConfigDict | None:
    """Returns the config of --config, else of the run in --workdir, else None."""
    if FLAGS.mode == 'import':
        return _config_to_import(get_default)
    if FLAGS.config is not None:
        found = _run_config_file(FLAGS.config, get_default)
        if FLAGS.model:  # which is not the system that the file is of
            found.system = get_default().system
        return found
    if not FLAGS.workdir or FLAGS.mode in WITHOUT_CONFIG:
        return None
    found = _config_of_run(get_default)
    return get_default() if found is None and FLAGS.model else found


def _config_of_run(get_default: Callable[[], ConfigDict]) -> ConfigDict | None:
    """Returns the config of the run in --workdir, or None."""
    path = workdir_path()
    record = workdir.read_record(path)
    if record is None:
        return None
    if 'model' in record:
        _file_of_model(record)
    try:
        return config_lib.from_dict(record['config'], get_default())
    except ConfigError as error:
        raise ConfigError(f'{path / "config.json"}: {error}') from error


def _config_to_import(get_default: Callable[[], ConfigDict]) -> ConfigDict:
    """Returns the config of weights to import: of --config, else that they were exported with.

    Of other weights it is not known how they were trained: they stand for the first step.
    """
    source = FLAGS['from'].value
    if not source:
        raise UserError('--from: needed, a file of weights, as --from=weights.safetensors')
    found = get_default()
    named = architectures.parse(FLAGS.architecture) if FLAGS.architecture else {}
    exported = tensor_files.exported(tensor_files.split(source)[0])
    if exported is not None:
        if FLAGS.config is not None:
            raise UserError(
                f'--config: {source} was exported with a config of its own, and is imported with '
                'it; --config.FIELD=VALUE sets a field'
            )
        try:
            found = config_lib.from_dict(exported['config'], found)
        except ConfigError as error:
            raise ConfigError(f'--from={source}: {error}') from error
        found.model.update(named)
        return found
    if FLAGS.config is not None:
        found = _run_config_file(FLAGS.config, get_default)
    elif not FLAGS.architecture:
        raise UserError('--architecture: needed, as --architecture=WRN-28-10')
    if found.system == get_default().system:
        found.system = tensor_files.split(source)[0].stem
    found.model.update(named)
    found.train.update(get_default().train)
    found.train.steps = 1
    return found


def _run_config_file(path: str, get_default: Callable[[], ConfigDict]) -> ConfigDict:
    """Returns the result of get_config() in a file; in FILE:TEXT the text is its argument.

    Raises:
      ConfigError: for anything that goes wrong in the file.
    """
    file, colon, text = path.partition(':')
    if not Path(file).is_file():
        raise ConfigError(f'--config={path}: found no such file{_config_hint(file)}')
    try:
        module = python_files.execute(file, 'config_file')
        config = module.get_config(*([text] if colon else []))
        if not isinstance(config, ConfigDict) or isinstance(config, FrozenConfigDict):
            kind = type(config).__name__
            raise ConfigError(f'get_config() has to return a ConfigDict, found {kind}')
        config_lib.check_fields(config, get_default())
    except ConfigError as error:
        raise ConfigError(f'--config={path}: {error}') from error
    except (Exception, SystemExit) as error:
        frames = list(traceback.walk_tb(error.__traceback__))
        lines = [line for frame, line in frames if frame.f_code.co_filename == file]
        where = line_of(error, file)
        what = f'{type(error).__name__}: {error}'
        last = frames[-1][0]
        if lines and last.f_code in _FIELD_ACCESS:
            line = linecache.getline(file, lines[-1])
            what = _unknown_field(last.f_locals['attribute'], line, get_default())
        raise ConfigError(f'--config={path}: {where}{what}') from error
    return config


def _unknown_field(name: str, line: str, default: ConfigDict) -> str:
    """Returns the message for a field or group that a config file misspells.

    That of ml_collections would list the whole group.

    Args:
      name: the name that ml_collections was asked for.
      line: the line of the file, which often has the group, as in config.train.stpes = 5.
      default: the config that has every field.
    """
    dotted = re.search(rf'\w\.((?:\w+\.)*{re.escape(name)})\b', line)
    found = dotted[1] if dotted else name
    known = config_lib.field_types(default)
    groups = {field.rpartition('.')[0] for field in known} - {''}
    return f'unknown config field {found}{config_lib.nearest_field(found, {*known, *groups})}'


def _config_hint(file: str) -> str:
    """Returns advice on a missing config file: the nearest one, or a list of all."""
    names = sorted(path.stem for path in CONFIGS.glob('*.py') if path.stem != '__init__')
    name = file.removesuffix('.py').replace('/', '.').rpartition('.')[2].lower()
    close = difflib.get_close_matches(name, names, n=1)
    folder = CONFIGS
    with contextlib.suppress(ValueError):
        folder = CONFIGS.relative_to(Path.cwd())
    if close:
        return f' (did you mean --config={folder / close[0]}.py?)'
    return f'; in {folder} there are {", ".join(names)}'


def config() -> ConfigDict:
    """Returns the validated config of the command line, with its references unresolved.

    Paths in it are absolute.

    Raises:
      ConfigError: naming the field.
    """
    found = FLAGS.config
    if found is None:
        raise missing_config()
    try:
        found.to_dict()
    except Exception as error:  # the user's own references to other fields may do anything
        cause = f'{type(error).__name__}: {error}'
        raise ConfigError(
            f'--config: a reference to a field cannot be computed ({cause})'
        ) from error
    config_checks.validate(found)
    config_lib.keep_network(found, check_unchanged=FLAGS.mode == 'train')
    if found.ensemble.members_from and FLAGS.mode not in EVALUATION_MODES:
        raise ConfigError(
            f'ensemble.members_from: only for --mode={_EVALUATION}, found --mode={FLAGS.mode}'
        )
    other_weights = found.train.ema_decay and found.eval.weights == 'trained'
    if other_weights and FLAGS.mode not in (*EVALUATION_MODES, 'export'):
        raise ConfigError(
            'eval.weights: trained weights of a run with train.ema_decay are evaluated by '
            f'--mode=evaluate, beside the averaged ones; found --mode={FLAGS.mode}'
        )
    if FLAGS.model and FLAGS.mode not in EVALUATION_MODES:
        raise UserError(f'--model: only for --mode={_EVALUATION}, found --mode={FLAGS.mode}')
    if FLAGS.mode == 'train' and found.study.systems and found.system == 'custom':
        raise ConfigError('study.systems: names systems, so this is for --mode=study')
    if FLAGS.mode == 'study':
        _tell_what_systems_set(found)
    for group, field in (
        (found.eval, 'blackbox_path'), (found.eval, 'indices'), (found.data, 'path')
    ):  # fmt: skip
        if group[field]:  # a run keeps the path and may go on in another directory
            group[field] = str(files.absolute(group[field]))
    return found


def _tell_what_systems_set(config: ConfigDict) -> None:
    """Warns of fields on the command line that a study's systems set to something else."""
    given = FLAGS['config'].override_values
    base = config.copy_and_resolve_references()
    for name in config.study.systems:
        made = systems.make_config(config, name, config.seed, 'study.systems', CONFIGS)
        for field in given:
            said, found = map(operator.attrgetter(field), (base, made))
            if found != said:
                logging.warning(
                    'study.systems: %s has %s=%s, not %s as on the command line: configs/%s.py '
                    'sets it',
                    name, field, values.shown(found), values.shown(said), name,
                )  # fmt: skip


def model_path() -> str | None:
    """Returns FILE:FUNCTION of --model, or of the model that --workdir belongs to; None for a run.

    Raises:
      UserError: if it belongs to a model that this command cannot find.
    """
    record = workdir.read_record(workdir_path())
    if FLAGS.model or not record or 'model' not in record:
        return FLAGS.model
    return _file_of_model(record)


def _file_of_model(record: Mapping[str, Any]) -> str:
    """Returns FILE:FUNCTION of the model in --workdir; raises UserError as `model_path` does."""
    file, function = record['model']['file'], record['model']['function']
    belongs = f'--workdir={FLAGS.workdir}: belongs to the model {function}'
    if FLAGS.mode not in EVALUATION_MODES:
        modes = ', '.join(EVALUATION_MODES)
        raise UserError(f'{belongs}; expected --mode={modes} or report, found {FLAGS.mode}')
    if not file:
        raise UserError(
            f'{belongs} of a program, which goes on by ensadv.evaluate; --mode=report shows its '
            'results'
        )
    return f'{file}:{function}'


def set_up_logging() -> None:
    """Shows this program's log, and the warnings of everything else."""

    def ours(record: python_logging.LogRecord) -> bool:
        parts = Path(record.pathname).parts
        return (
            # Orbax and CLU also log, thread by thread, errors that they raise.
            (record.levelno >= python_logging.WARNING and not {'orbax', 'clu'} & set(parts))
            # By the whole path: an environment may lie in a checkout called ensadv.
            or Path(__file__).parent in Path(record.pathname).parents
        )

    logging.get_absl_handler().addFilter(ours)
    # Orbax's unfinished writes report their errors here when nobody waits for them any more.
    sys.unraisablehook = lambda args: logging.debug('%s', args.err_msg, exc_info=args.exc_value)
    # The next write to TensorBoard raises the error of its thread.
    threading.excepthook = _log_thread_error
    # Progress bars show what the log would.
    if not FLAGS['verbosity'].present:
        logging.set_verbosity(logging.WARNING if terminal.draws_bars() else logging.INFO)


def _log_thread_error(args: threading.ExceptHookArgs) -> None:
    if type(args.thread).__module__.startswith('tensorboard.'):
        logging.debug('%s', args.thread, exc_info=args.exc_value)
    else:
        threading.__excepthook__(args)


def closing_lines() -> str:
    """Returns the last lines of a job: where its results are, and the commands that show them."""
    folder = shlex.quote(FLAGS.workdir)
    lines = {
        'results': folder,
        'accuracies': f'python main.py --mode=evaluate --workdir={folder}',
        'tables and figures': f'python main.py --mode=report --workdir={folder}',
    }
    if FLAGS.mode == 'study':
        del lines['accuracies']
    if FLAGS.mode == 'blackbox':
        file = shlex.quote(f'{FLAGS.workdir.rstrip("/")}/blackbox.npz')
        lines = {'to judge a run by it': f'--config.eval.blackbox_path={file}'}
    width = max(map(len, lines)) + 1
    return '\n'.join(f'{f"{name}:".ljust(width)} {what}' for name, what in lines.items())
