"""What an exported ensemble says of itself: the model card, and RobustBench's fields."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import scipy.stats

import ensadv
from ensadv import architectures, build
from ensadv import config as config_lib
from ensadv.attacks import registry
from ensadv.evaluation import finished_runs
from ensadv.report import basis, collect, comparable, tables
from ensadv.report import run as report_run
from ensadv.storage import audits, selection, workdir

_COMBINES = {
    'probs': 'the mean of their probabilities',
    'logits': 'the mean of their logits',
    'gating': 'a mean of their probabilities, whose weights depend on the image',
}
_BENCHMARKS = ('cifar10', 'cifar100')  # of RobustBench's data sets those that a config can name
_USE = """\
```python
import model

ensemble = model.load()
logits = ensemble(images)  # float32 [B, {shape}] in [0, 1] -> [B, {classes}]
```

`model.py` needs PyTorch alone. Give it images as they are: the standardisation (mean {mean}, \
deviation {std} of each channel) is inside. The log_softmax of its outputs are the \
log-probabilities.

```
python check.py
python model.py --onnx model.onnx
python check.py --onnx model.onnx
```

The first command compares log-probabilities of {n} test images with those that ensadv computed. \
The second writes ONNX for any number of images (`pip install onnx onnxscript`), and the third \
checks that with onnxruntime.
"""


def make(run: finished_runs.Run, digest: str, images: int) -> dict[str, str]:
    """Returns README.md and robustbench.json, by name.

    Args:
      run: what is exported.
      digest: SHA-256 of weights.safetensors.
      images: in reference.safetensors.

    Raises:
      UserError: if a file of the run is damaged.
    """
    folder = workdir.weights_folder(run.path, run.config)
    found = report_run.read(folder if folder.exists() else run.path, run.path.name)
    if folder != run.path and not folder.exists():
        found = dataclasses.replace(found, evaluations={})  # they are of the other weights
    results = found.results(run.step) if run.step in found.evaluations else []
    parts = [
        f'# {run.config.system}, seed {run.config.seed}',
        _summary(run, digest),
        '## Use',
        _use(run, images),
        '## Accuracy',
        *_accuracy(run, found, results),
        '## Audit',
        _audit(found, run.step, results),
        '## How it was made',
        _list(_made(run, found, results)),
        '## RobustBench',
        _robustbench_words(run, results),
        '## Licence',
        'None is given here: the authors of this model choose one.',
    ]
    return {
        'README.md': '\n\n'.join(part.strip() for part in parts) + '\n',
        'robustbench.json': json.dumps(robustbench(run, results), indent=2) + '\n',
    }


def _summary(run: finished_runs.Run, digest: str) -> str:
    config, dataset = run.config, run.record['dataset']
    k, group = config.ensemble.size, config.model
    network = architectures.words(group.name, group.depth, group.width, group.activation)
    members = f'{k} x {network}, combined by {_COMBINES[config.ensemble.combine]}'
    which = 'averaged over the steps' if config_lib.weights(config) == 'averaged' else 'as trained'
    return _list(
        [
            f'Network: {members if k > 1 else network}; {run.record["parameters"]:,} parameters.',
            f'Data: {dataset["name"]}, {dataset["num_classes"]} classes; fingerprint '
            f'{dataset["fingerprint"][:16]}....',
            f'Threat model: {registry.threat_model_words(config.norm, config.epsilon)}.',
            f'Weights: of the last step, {run.step:,}, {which}; weights.safetensors has SHA-256 '
            f'{digest}.',
            f'Exported by ensadv {ensadv.__version__}.',
        ]
    )


def _use(run: finished_runs.Run, images: int) -> str:
    dataset = run.record['dataset']
    height, width, channels = dataset['image_shape']
    shape = f'{channels}, {height}, {width}'
    mean, std = (
        ', '.join(f'{value:.4g}' for value in values)
        for values in build.standardisation(run.config, dataset)
    )
    classes = dataset['num_classes']
    return _USE.format(shape=shape, classes=classes, mean=mean, std=std, n=images)


def _accuracy(
    run: finished_runs.Run, found: report_run.Run, results: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Returns the table of accuracies, or that there is none, and what to know of it."""
    if not results:
        return ['These weights were not evaluated.']
    rows = [['attack', 'accuracy in %', '95 % interval', 'n']]
    robust = found.evaluations[run.step].get('robust')
    named = [('robust', robust)] if robust else []
    named += [(selection.ledger_key(result), result) for result in results]
    for name, result in named:
        low, high = scipy.stats.binomtest(result['correct'], result['n']).proportion_ci(
            method='wilson'
        )
        accuracy = f'{100 * result["accuracy"]:.2f}'
        rows.append([name, accuracy, f'{100 * low:.1f} to {100 * high:.1f}', f'{result["n"]:,}'])
    total = run.record['dataset']['num_test']
    notes = [
        f'n: test images, of {total:,}. The interval (Wilson) is of the choice of these images '
        'alone, for this one training.',
    ]
    if robust:
        notes.insert(0, f'robust: correct under all of {", ".join(robust["attacks"])}.')
    if ignored := [f'{k}: {r["no_gradient"]:,}' for k, r in named if r.get('no_gradient')]:
        notes.append(
            'Images that stood only because no gradient was found are not counted as correct: '
            f'{", ".join(ignored)}.'
        )
    return [tables.markdown(rows), _list(notes)]


def _audit(found: report_run.Run, step: int, results: Sequence[Mapping[str, Any]]) -> str:
    content = audits.read(found.path, step) if results else None
    if content is None:
        return 'Not audited: nobody has checked whether the robust accuracy can be believed.'
    old = '' if audits.is_current(content, results) else ', of fewer attacks than stand above'
    failed = [c for c in content['checks'] if c['verdict'] == audits.FAILED]
    first = (
        f'{audits.verdict(content)} (n {content["n"]:,}{old}). Under its own attacks as well '
        f'{100 * content["found"]:.1f} % stand, where {100 * content["reported"]:.1f} % were '
        'reported.'
    )
    return '\n\n'.join([first, _list(f'{c["name"]}: {c["evidence"]}' for c in failed)])


def _made(
    run: finished_runs.Run, found: report_run.Run, results: Sequence[Mapping[str, Any]]
) -> list[str]:
    if results:
        found = dataclasses.replace(found, labels=comparable.labels([found]))
    collection = collect.Collection([found], [])
    dataset = run.record['dataset']
    data = [f'Trained on {dataset["num_train"]:,} images of {dataset["name"]}.']
    training = basis.training(collection)
    lines = [*(data if training else []), *training, *basis.imported(collection)]
    if results:
        lines += [*basis.settings(collection), *basis.machines(collection)]
    return lines


def robustbench(
    run: finished_runs.Run, results: Sequence[Mapping[str, Any]]
) -> dict[str, str | int | bool]:
    """Returns the fields of RobustBench's model_info; those that only the authors know are ''.

    Accuracies in % are those on the whole test set; '' where they were not measured on it.
    """
    config, total = run.config, run.record['dataset']['num_test']
    known = {'clean': {}, 'autoattack': registry.defaults('autoattack', config.epsilon)}
    known['autoattack'].pop('examples', None)

    def accuracy(name):
        """Returns that of an attack as published; '' where it was not made on all images."""
        for r in (r for r in results if r['name'] == name and r['n'] == total):
            if all(r['settings'].get(field) == value for field, value in known[name].items()):
                return f'{100 * r["accuracy"]:.2f}'
        return ''

    k, group = config.ensemble.size, config.model
    names = {'wide_resnet': 'WideResNet-{depth}-{width}', 'vgg': 'VGG-{depth}'}
    fields = {
        'link': '',
        'name': '',
        'authors': '',
        'additional_data': bool(config.data.extra),
        'number_forward_passes': k,
        'dataset': run.record['dataset']['name'],
        'venue': '',
        'architecture': names[group.name].format(depth=group.depth, width=group.width),
        'eps': _in_255(config.epsilon),
        'clean_acc': accuracy('clean'),
        'reported': accuracy('autoattack'),
        'autoattack_acc': accuracy('autoattack'),
        'unreliable': False,
    }
    if k > 1:
        fields['footnote'] = f'Uses an ensemble of {k} models.'
    return fields


def _robustbench_words(run: finished_runs.Run, results: Sequence[Mapping[str, Any]]) -> str:
    fields = robustbench(run, results)
    norm = {'linf': 'Linf', 'l2': 'L2'}[run.config.norm]
    dataset = fields['dataset']
    missing = [name for name, value in fields.items() if value == '']
    lines = [
        'robustbench.json has the fields of a file of its model_info, '
        f'model_info/{dataset}/{norm}/NAME.json. To be filled in: {", ".join(missing)}.',
        'Accuracies are there only of the whole test set; autoattack_acc is of AutoAttack as '
        'published.',
        "A submission is an issue by RobustBench's form New Model: the paper's title, link and "
        'authors, and for each model architecture, threat model, eps, clean and robust accuracy, '
        'additional data (true or false), the method of evaluation, and where checkpoint and code '
        'are.',
    ]
    if dataset not in _BENCHMARKS:
        lines.append(f'It has no leaderboard of {dataset}.')
    return _list(lines)


def _in_255(epsilon: float) -> str:
    levels = 255 * epsilon
    return f'{round(levels)}/255' if abs(levels - round(levels)) < 1e-6 else f'{epsilon:.4g}'


def _list(lines) -> str:
    return '\n'.join(f'- {line}' for line in lines)
