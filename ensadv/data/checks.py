"""One line that says what a data set holds, and warnings of content that is hardly meant."""

import functools
from typing import TYPE_CHECKING

import numpy as np
from absl import logging

from ensadv.runtime import distributed

if TYPE_CHECKING:
    from ensadv.data.datasets import Dataset
    from ensadv.data.extra import Extra

_DARK = 64  # levels; no real set of images has all its pixels within so few
# Standard sets have a few images twice. Below this share that changes no accuracy of three digits;
# the line about the data counts them all the same.
_FEW = 0.01


@functools.lru_cache(maxsize=1)  # several jobs of a run ask for the same data
def tell(dataset: 'Dataset', source: str) -> None:
    """Logs the summary and the doubts, once.

    Args:
      dataset: with its validation split held out.
      source: its file or name, with which the lines begin.
    """
    distributed.tell(f'{source}: {summary(dataset)}')
    for doubt in doubts(dataset):
        logging.warning('%s: %s', source, doubt)


def tell_extra(dataset: 'Dataset', extra: 'Extra') -> None:
    """Logs how many extra images there are, and warns of test images in their sample."""
    distributed.tell(f'data.extra: {len(extra.labels):,} images')
    known = {hash(image.tobytes()) for image in dataset.image_test}
    count = sum(hash(image.tobytes()) in known for image in extra.sample)
    if count:
        logging.warning(
            'data.extra: of %s images that were looked at %s are test images, to the bit: accuracy '
            'would measure memory; leave them out',
            f'{len(extra.sample):,}',
            f'{count:,}',
        )


def summary(dataset: 'Dataset') -> str:
    """Returns a line: sizes, shape, classes, range of the pixels, images per class."""
    splits = {'training': 'train', 'validation': 'validation', 'test': 'test'}
    sizes = [f'{len(dataset.split(split)[1]):,} {name}' for name, split in splits.items()]
    height, width, channels = dataset.image_shape
    counts = np.bincount(dataset.label_train, minlength=dataset.num_classes)
    text = (
        f'{", ".join(sizes)} images of {height} x {width} pixels and {channels} '
        f'channel{"s" * (channels > 1)}, {dataset.num_classes} classes; training: pixels '
        f'{dataset.image_train.min()}..{dataset.image_train.max()} of 0..255, '
        f'{counts.min():,}..{counts.max():,} images per class'
    )
    shared = {split: _also_in_training(dataset, split) for split in ('validation', 'test')}
    told = [f'{count:,} {split} images' for split, count in shared.items() if count]
    return f'{text}; {" and ".join(told)} are training images too' if told else text


def doubts(dataset: 'Dataset') -> list[str]:
    """Returns a line for each thing that is hardly meant: what was found, and what is usual."""
    # Splits of images that are all alike also share images: only the first reason is worth a line.
    of_pixels = _range(dataset)
    found = (
        _classes(dataset),
        _layout(dataset),
        *(of_pixels or (_constant(dataset), *_shared(dataset))),
    )
    return [doubt for doubt in found if doubt]


def _classes(dataset: 'Dataset') -> str:
    classes, largest = dataset.num_classes, dataset.num_classes - 1
    train, validation, test = (
        np.bincount(dataset.split(split)[1], minlength=classes)
        for split in ('train', 'validation', 'test')
    )
    there, n = int(np.count_nonzero(train)), len(dataset.label_train)
    if there > 10 and 2 * there > n:
        return (
            f'{there:,} different labels of {n:,} training images: labels usually name a few '
            'classes, but these look like image numbers or measured values'
        )
    untrained = np.flatnonzero(train == 0)
    untested = np.flatnonzero((test == 0) & (train > 0))
    if not len(untrained) and not len(untested):
        return ''
    facts = [
        f'no {split} image has {_named(labels)}'
        for split, labels in (('training', untrained), ('test', untested))
        if len(labels)
    ]
    if np.any(validation[untrained]):
        usual = 'set fewer data.validation_examples, to leave training images of every class'
    elif len(untrained) and untrained[-1] == len(untrained) - 1:
        usual = f'labels usually start at 0: subtract {len(untrained)} from all of them'
    elif largest in untested:
        count = int(train[largest])
        usual = (
            f'a label like {largest}, of {count:,} training image{"s" * (count > 1)}, is usually '
            'a slip or marks images to leave out: remove them'
        )
    elif len(untrained):
        usual = 'classes are usually numbered without gaps, and all of them have training images'
    else:
        usual = 'test images are usually of all classes'
    return f'{classes:,} classes follow from the labels, but {" and ".join(facts)}; {usual}'


def _named(labels: np.ndarray) -> str:
    """Returns 'label 3', or 'one of the labels 3..9', or 'one of the labels 3, 5, 8, ...'."""
    if len(labels) == 1:
        return f'label {labels[0]}'
    if labels[-1] - labels[0] == len(labels) - 1:
        return f'one of the labels {labels[0]}..{labels[-1]}'
    return f'one of the labels {", ".join(map(str, labels[:5]))}{", ..." * (len(labels) > 5)}'


def _layout(dataset: 'Dataset') -> str:
    height, width, channels = shape = dataset.image_shape
    if height <= 4 < min(width, channels):
        return (
            f'images of {height} x {width} pixels with {channels} channels: this usually means '
            f'[n, channels, height, width], but ensadv needs [n, height, width, channels]: '
            'np.moveaxis(images, 1, -1)'
        )
    if 1 in (height, width):
        return (
            f'images of {height} x {width} pixels with {channels} channel{"s" * (channels > 1)}: '
            'these are usually flattened, or no images; ensadv needs [n, height, width, channels]: '
            'images.reshape(...)'
        )
    if channels in (2, 4) and np.all(dataset.image_train[..., -1] == 255):
        return (
            f'images {shape} whose last channel is 255 everywhere: this is usually opacity, which '
            'attacks would change, too: images[..., :-1]'
        )
    return ''


def _range(dataset: 'Dataset') -> list[str]:
    """Returns at most one doubt, about splits whose pixels are all close to each other."""
    found = {}
    for split in ('train', 'test'):
        images = dataset.split(split)[0]
        low, high = int(images.min()), int(images.max())
        if high - low < _DARK:
            found[split] = low, high
    if not found:
        return []
    names = ' and '.join(f'image_{split}' for split in found)
    low, high = min(low for low, _ in found.values()), max(high for _, high in found.values())
    if low == high:
        return [f'{names}: all pixels are {low}; the images were probably not read']
    usual = f'scale values in 0..{high} to 0..255, times {255 / high:.4g} first'
    if low:
        usual = 'scale values in another range to 0..255 first'
    only = f'{low} and {high} only' if high - low == 1 else f'{low}..{high}'
    return [f'{names}: pixels are {only}, of 0..255 (nearly no contrast): {usual}']


def _is_constant(images: np.ndarray) -> np.ndarray:
    """Returns which images have the same value in all pixels, bool [n]."""
    return np.all(images == images[:, :1, :1, :1], axis=(1, 2, 3))


def _constant(dataset: 'Dataset') -> str:
    counts = {}
    for split in ('train', 'test'):
        images = dataset.split(split)[0]
        count = int(np.sum(_is_constant(images))) if images[0].size > 1 else 0
        if count > _FEW * len(images):
            counts[f'image_{split}'] = f'{count:,} of {len(images):,}'
    if not counts:
        return ''
    told = ' and '.join(f'{count} of {name}' for name, count in counts.items())
    return f'{told} have one value for all pixels; they were probably not read'


@functools.lru_cache(maxsize=2)  # both held-out splits of one data set
def _also_in_training(dataset: 'Dataset', split: str) -> int:
    """Returns how many images of a split are also training images, to the bit.

    Images with the same value in all pixels do not count.
    """
    images = dataset.split(split)[0]
    images = images[~_is_constant(images)]
    known = {hash(image.tobytes()) for image in dataset.image_train}  # 64 bits: no collisions
    return sum(hash(image.tobytes()) in known for image in images)


def _shared(dataset: 'Dataset') -> list[str]:
    found = []
    for split in ('validation', 'test'):
        count, n = _also_in_training(dataset, split), len(dataset.split(split)[1])
        if count > _FEW * n:
            found.append(
                f'{count:,} of {n:,} {split} images are training images too: accuracy on them '
                'measures memory; splits usually have no image in common'
            )
    return found
