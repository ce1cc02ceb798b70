"""The report's section on decision planes, the paper's Figures 3 and 4."""

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ensadv.errors import UserError
from ensadv.report import page, paper, plane_figures
from ensadv.report.collect import Collection
from ensadv.report.sections import Writer, in_grey
from ensadv.storage import plane_files
from ensadv.storage.plane_files import Planes


def section(collection: Collection, writer: Writer) -> page.Section:
    """Figures 3 and 4, from the files of --mode=planes in the runs' workdirs."""
    blocks: list[Any] = []
    found: list[tuple[str, Planes]] = []
    for run in collection.runs:
        for path in run.plane_files:
            # Two runs may have files of the same name, as 'members'.
            stem = path.stem if path.stem.startswith(run.name) else f'{run.name}_{path.stem}'
            try:
                found.append((stem, plane_files.read(path)))
            except UserError as error:
                blocks.append(f'Left out: {error}.')
    responses = [planes for _, planes in found if planes.is_response]
    groups = itertools.groupby(sorted(responses, key=_order), key=lambda each: _order(each)[0])
    for number, (_, group) in enumerate(groups, start=1):
        blocks.append(_boundaries(list(group), number, writer))
    for stem, planes in found:
        name = f'figure4_{re.sub("[^A-Za-z0-9.-]", "_", stem)}'
        names = [planes.names[r] for r in planes.shown]
        caption = (
            f'Figure 4. Decision regions of {" and ".join(names)} on the plane through each image '
            f'and the adversarial examples ({_attack(planes)}) of '
            f'{" and ".join(planes.attacked)}. Each point of a panel is a forward pass; the darker '
            'ones are no images, since some pixel value there is outside of [0, 1]. Light outline: '
            f'all that an attack may reach in this plane.{_of_images(planes)}'
        )
        alt = 'Decision regions of models on planes in image space'
        blocks.append(writer.figure(name, plane_figures.regions(planes), caption, alt))
    return page.Section('Decision planes', 'planes', blocks)


def _order(planes: Planes) -> tuple[Any, ...]:
    """Returns what the planes of one Figure 3 have in common, and their place in it."""
    alike = json.dumps([planes.record.get(name) for name in ('attack', 'settings', 'resolution')])
    system = planes.attacked[1].split(', ')[0]
    place = paper.SYSTEMS.index(system) if system in paper.SYSTEMS else len(paper.SYSTEMS)
    return (planes.places.tolist(), float(planes.window), alike), place, planes.attacked[1]


def _boundaries(responses: Sequence[Planes], number: int, writer: Writer) -> page.FigureBlock:
    shares = []
    for planes in responses:
        of_images = [plane_figures.label_shares(planes, i) for i in range(len(planes.places))]
        means = 100 * np.mean(of_images, axis=0)[planes.shown]
        pairs = zip(planes.attacked, means, strict=True)
        shares.append(' and '.join(f'{mean:.0f} % by {name}' for name, mean in pairs))
    caption = (
        'Figure 3, as measured: what adversarial training changes. Each line is where a model no '
        'longer predicts the label, on the plane through the image and the adversarial examples '
        f'({_attack(responses[0])}) of both systems. A model without a line gives the label all '
        'of the window, or nothing of it. Above each panel stands the share of the permitted '
        'region of this plane that is given the label, without and with adversarial training; on '
        f'average over these {len(responses[0].places)} images: {"; ".join(shares)}.'
        f'{_of_images(responses[0])}'
    )
    alt = 'Decision boundaries of cleanly and adversarially trained models on planes'
    name = 'figure3' if number == 1 else f'figure3_{number}'
    return writer.figure(name, plane_figures.boundaries(responses), caption, alt)


def _attack(planes: Planes) -> str:
    return planes.record['attack'].upper()


def _of_images(planes: Planes) -> str:
    """Returns how the images of planes were chosen, and how they are drawn, as sentences."""
    chosen = ''
    near = 'epsilon/√d' if planes.record.get('norm') == 'l2' else 'epsilon'
    if not planes.record['places'] and planes.saturated.any():
        numbers = ', '.join(map(str, planes.saturated))
        chosen = (
            f' The images are those of the test set with the fewest pixel values within {near} of '
            f'0 or 1 ({numbers} of {planes.images[0].size}).'
        )
    elif not planes.record['places']:
        chosen = (
            f' The images are the first of the test set without a pixel value within {near} of 0 '
            'or 1.'
        )
    return f'{chosen}{in_grey(planes.images)}'
