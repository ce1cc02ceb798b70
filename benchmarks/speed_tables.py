"""The tables of speed.py: from measurements to Markdown. Measures nothing. None: out of memory."""

import statistics

OURS, EAGER, COMPILED = 'ensadv', 'PyTorch', 'PyTorch, torch.compile'
ALLOWED_POINTS = 0.5  # by which a robust accuracy may exceed a library's, to count as its equal
MIB = 2**20
KINDS = ('grouped', 'separate')  # of convolutions


def markdown(columns, rows):
    """Returns a table's lines; a cell that is None is shown as '-'."""
    show = lambda cells: f'| {" | ".join("-" if cell is None else str(cell) for cell in cells)} |'
    return [show(columns), f'|{" --- |" * len(columns)}', *map(show, rows)]


def seconds_cell(times):
    """Returns a cell with the median of times, and the least and the largest; None without any."""
    if not times:
        return None
    if len(times) == 1:
        return f'{times[0]:.3f}'
    return f'{statistics.median(times):.3f} ({min(times):.3f}..{max(times):.3f})'


def name_of(network):
    """Returns a network's name, as in WRN-10-2."""
    return f'WRN-{network["depth"]}-{network["width"]}'


def full_name(network):
    """Returns a network's name with its members and batch."""
    return f'{network["members"]} x {name_of(network)}, batch {network["batch"]}'


def largest(found):
    """Returns the largest difference of each kind over many [what, difference, allowed]."""
    result = {}
    for what, difference, allowed in found:
        result[what] = max(result.get(what, (0.0, allowed)), (difference, allowed))
    return result


def speedup(seconds):
    """Returns how many times as fast as the fastest peer ours is; seconds: {side: [seconds]}."""
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    return min(value for side, value in medians.items() if side != OURS) / medians[OURS]


def steps_table(rows):
    """Returns the lines of whole steps; rows: [(network, result of `speed_workers.step`), ...]."""
    columns = ['network', 'members', 'batch', 'ensadv, s', 'PyTorch eager, s', 'compiled, s']
    columns += ['PyTorch at its best / ensadv']
    lines, found = [], []
    for network, result in rows:
        cells = [name_of(network), network['members'], network['batch']]
        if result is None:
            lines.append([*cells, 'out of memory', None, None, None])
            continue
        seconds, found = result['seconds'], found + result['found']
        cells += [seconds_cell(seconds.get(side)) for side in (OURS, EAGER, COMPILED)]
        lines.append([*cells, f'{speedup(seconds):.3g}'])
    differences = [
        (what, f'{difference:.1e}', f'{allowed:.2g}')
        for what, (difference, allowed) in largest(found).items()
    ]
    return [
        *markdown(columns, lines),
        '',
        'Seconds per step: the median of the turns, and in brackets the least and the largest.',
        '',
        'Both compute the same. The largest differences over all rows:',
        '',
        *markdown(['', 'difference', 'allowed'], differences),
    ]


def attacks_table(rows):
    """Returns the lines of attacks; rows: [(name, result of `speed_workers.attack`), ...]."""
    lines = []
    for name, result in rows:
        mine = result['sides'][OURS]
        for side, facts in result['sides'].items():
            ratio = None
            if side != OURS:
                ratio = f'{speedup({OURS: mine["seconds"], side: facts["seconds"]}):.3g}'
                # The speed of a weaker attack is worth nothing.
                if 100 * (mine['accuracy'] - facts['accuracy']) > ALLOWED_POINTS + 1e-9:
                    ratio = 'ensadv is weaker'
            accuracy = f'{100 * facts["accuracy"]:.2f}'
            lines.append([name, side, seconds_cell(facts['seconds']), ratio, accuracy])
    told = [
        f'{result["title"]}: {name}, n = {result["n"]} in batches of {result["batch"]}, epsilon '
        f'{result["epsilon"]:.4g}, step size {result["step_size"]:.4g}. Log-probabilities differ '
        f'by at most {result["difference"]:.1e}.'
        for name, result in rows
    ]
    return [
        *told,
        '',
        *markdown(['attack', 'by', 's', 'it / ensadv', 'robust accuracy, %'], lines),
        '',
        'One start, at the images themselves; float32. ensadv runs what evaluation runs and counts '
        'the worst iterate. Fooled examples leave a long attack, except for a tenth of all. The '
        'libraries count the last iterate and take all steps with all images.',
    ]


def memory_table(rows):
    """Returns the lines of memory and rematerialisation.

    Args:
      rows: [(network, {side: result of `speed_workers.alone`}), ...].
    """
    lines = []
    for network, sides in rows:
        for side, found in sides.items():
            cells = [name_of(network), network['members'], network['batch'], side]
            if found is None:
                lines.append([*cells, 'out of memory', None])
                continue
            peak = f'{(found["peak"] - found["level"]) / MIB:.0f}'
            lines.append([*cells, peak, seconds_cell(found['seconds'])])
    return [
        *markdown(['network', 'members', 'batch', '', 'peak of a step, MiB', 's per step'], lines),
        '',
        'Each side has a process of its own. The peak is that of two steps, less the memory in use '
        'just before the first.',
    ]


def convolutions_table(rows):
    """Returns the lines of KINDS of convolutions.

    Args:
      rows: [(network, [result of `speed_workers.alone` for each kind]), ...].
    """
    lines = []
    for network, found in rows:
        cells = [name_of(network), network['members'], network['batch']]
        cells += ['out of memory' if one is None else seconds_cell(one['seconds']) for one in found]
        ratio = None
        if None not in found:
            grouped, separate = (statistics.median(one['seconds']) for one in found)
            ratio = f'{grouped / separate:.3g}'
        lines.append([*cells, ratio])
    columns = ['network', 'members', 'batch', *(f'{kind}, s' for kind in KINDS), ' / '.join(KINDS)]
    return markdown(columns, lines)
