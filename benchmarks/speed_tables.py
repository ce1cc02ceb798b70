"""The tables of speed.py and speed_gpu.py: from what was measured to Markdown. Measures nothing."""

import statistics

OURS, EAGER, COMPILED = 'ensadv', 'PyTorch', 'PyTorch, torch.compile'
ALLOWED_POINTS = 0.5  # between two robust accuracies, to be called the same verdict
MIB = 2**20


def markdown(columns, rows):
    """Returns a table's lines; a cell that is None is shown as '-'."""
    show = lambda cells: f'| {" | ".join("-" if cell is None else str(cell) for cell in cells)} |'
    return [show(columns), f'|{" --- |" * len(columns)}', *map(show, rows)]


def at_least(value, target):
    """Returns the cells 'target' and 'verdict' of what is to be large; without a target '-'."""
    if target is None:
        return None, None
    return f'>= {target:g}', 'met' if value >= target else 'not met'


def at_most(value, target):
    """Returns the cells 'target' and 'verdict' of what is to be small; without a target '-'."""
    if target is None:
        return None, None
    return f'<= {target:g}', 'met' if value <= target else 'not met'


def seconds_cell(times):
    """Returns a cell of times: their median, and the least and largest; '-' without any."""
    if not times:
        return None
    median = statistics.median(times)
    return (
        f'{median:.3f}' if len(times) == 1 else f'{median:.3f} ({min(times):.3f}..{max(times):.3f})'
    )


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


def steps_table(rows, target):
    """Returns the lines of whole steps, ours and PyTorch's.

    Args:
      rows: [(network, what `speed_workers.step` returned), ...].
      target: speedup, at least.
    """
    columns = ['network', 'members', 'batch', 'ensadv, s', 'PyTorch eager, s', 'compiled, s']
    columns += ['PyTorch at its best / ensadv', 'target', 'verdict', 'cores busy', 'first step, s']
    lines, found = [], []
    for network, result in rows:
        cells = [name_of(network), network['members'], network['batch']]
        if 'out_of_memory' in result:
            lines.append([*cells, f'out of memory: {result["out_of_memory"]}', *[None] * 7])
            continue
        seconds, found = result['seconds'], found + result['found']
        ratio = speedup(seconds)
        cells += [seconds_cell(seconds.get(side)) for side in (OURS, EAGER, COMPILED)]
        cells += [f'{ratio:.3g}', *at_least(ratio, target)]
        for name, digits in (('cores', 2), ('first', 0)):
            sides = (OURS, EAGER, COMPILED)
            shown = [f'{result[name][side]:.{digits}f}' for side in sides if side in result[name]]
            cells.append(', '.join(shown))
        lines.append(cells)
    differences = [
        (what, f'{difference:.1e}', f'{allowed:.2g}')
        for what, (difference, allowed) in largest(found).items()
    ]
    return [
        *markdown(columns, lines),
        '',
        'Seconds per step: medians of turns (in brackets the least and the largest). Columns with '
        'several numbers: ensadv, eager, compiled. "First step": ensadv compiles; PyTorch makes a '
        'step, and compiles for it.',
        '',
        'Both compute the same; the largest differences over all rows:',
        '',
        *markdown(['', 'difference', 'allowed'], differences),
    ]


def verdict_of(ours, theirs):
    """Compares two robust accuracies in [0, 1]; returns (whether ours is not weaker, words)."""
    points = 100 * (ours - theirs)
    if abs(points) <= ALLOWED_POINTS + 1e-9:
        return True, f'same ({points:+.2f} points)'
    if points < 0:
        return True, f'ensadv stronger by {-points:.2f} points'
    return False, f'NOT the same: ensadv leaves {points:.2f} points more'


def attacks_table(rows):
    """Returns the lines of robust accuracy, ours and the libraries'.

    Args:
      rows: [(attack's name, target, what `speed_workers.attack` returned), ...]; the target is a
        speedup over each library, at least.
    """
    columns = ['attack', 'by', 'n', 's', 'it / ensadv', 'target', 'verdict', 'robust accuracy, %']
    columns += ['same verdict', 'images at a time', 'compiled', 'compiling, s']
    lines = []
    for name, target, result in rows:
        sides = result['sides']
        mine = sides[OURS]
        for side, facts in sides.items():
            compared = [None] * 3
            same = None
            if side != OURS:
                ratio = speedup({OURS: mine['seconds'], side: facts['seconds']})
                strong, same = verdict_of(mine['accuracy'], facts['accuracy'])
                shown, verdict = at_least(ratio, target)
                compared = [f'{ratio:.3g}', shown, verdict if strong else 'not met: weaker']
            lines.append(
                [
                    name,
                    side,
                    result['n'],
                    seconds_cell(facts['seconds']),
                    *compared,
                    f'{100 * facts["accuracy"]:.2f}',
                    same,
                    facts['batch'],
                    None if side == OURS else 'yes' if facts['compiled'] else 'no',
                    f'{facts["first"]:.1f}',
                ]
            )
    titles = sorted({result['title'] for _, _, result in rows})
    sizes = ', '.join(f'{name} {result["step_size"]:.4g}' for name, _, result in rows)
    epsilon = max(result['epsilon'] for _, _, result in rows)
    difference = max(result['difference'] for _, _, result in rows)
    return [
        f'{"; ".join(titles)}. Epsilon {epsilon:.4g}, step sizes: {sizes}; from the images '
        f'themselves, one start, float32. Log-probabilities differ by at most {difference:.1e}.',
        '',
        *markdown(columns, lines),
        '',
        'ensadv is what evaluation runs. Its verdict is on the worst iterate; examples that are '
        "fooled leave a long attack, but for a tenth (as by default on CIFAR-10). The libraries' "
        'verdicts are on the last iterate, and they take all steps with all images. Images at a '
        'time, and compiled or not: what was fastest in a trial. What one library has compiled '
        'serves the other.',
    ]


def scaling_table(rows):
    """Returns the lines of our step over one setting at a time.

    Args:
      rows: [(setting's name, [values], [[seconds], ...] or why not, target), ...]; the target is
        of the time over (the first value's times how many times the value is larger), at most.
    """
    columns = ['over', 'value', 's per step', 'times the first', 'per unit', 'target', 'verdict']
    lines = []
    for name, values, seconds, target in rows:
        base = None
        for value, times in zip(values, seconds, strict=True):
            if isinstance(times, str):
                lines.append([name, value, f'out of memory: {times}', *[None] * 4])
                continue
            median = statistics.median(times)
            base = base or (value, median)
            ratio = median / base[1]
            per_unit = ratio * base[0] / value
            judged = at_most(per_unit, target) if value != base[0] else (None, None)
            cells = [name, value, seconds_cell(times), f'{ratio:.3g}']
            # Devices share the same cores: twice as many are not to take twice as long.
            lines.append([*cells, None if name == 'devices' else f'{per_unit:.3g}', *judged])
    return [
        *markdown(columns, lines),
        '',
        '"Per unit" is the time per member, step or image, over that of the first row.',
    ]


def main_table(result):
    """Returns the lines of `main.py` against the bare step; `result` is `speed.measure_main`'s."""
    bare = statistics.mean(map(statistics.median, result['bare']))
    runs = [run['seconds_per_step'] for run in result['runs']]
    more = 100 * (statistics.mean(runs) / bare - 1)
    outside = [outside_calls(run['calls']) for run in result['runs']]
    first, again = result['runs']
    show = lambda values: ', '.join(f'{value:.3f}' for value in values)
    # Those that the cache should have had, and those that it has now but had not.
    anew = max(again['requests'] - again['hits'], len(again['new_files']))
    rows = [
        ('bare step before and after, s', show(map(statistics.median, result['bare'])), None, None),
        ('`main.py`, first and second start, s per step', show(runs), None, None),
        ('`main.py` more than bare, %', f'{more:+.1f}', *at_most(more, 3)),
        (
            '`main.py` outside the compiled steps, % of the time inside',
            f'{", ".join(f"{100 * share:.2f}" for share in outside)}',
            *at_most(100 * max(outside), 3),
        ),
        (
            'first start: process start to first metrics, s',
            f'{first["first_metrics"]:.1f}',
            *at_most(first['first_metrics'], 60),
        ),
        ('first start: programs compiled', first['requests'] - first['hits'], None, None),
        (
            'second start: process start to first metrics, s',
            f'{again["first_metrics"]:.1f}',
            None,
            None,
        ),
        ('second start: programs compiled anew', anew, *at_most(anew, 0)),
    ]
    return [
        *markdown(['', 'measured', 'target', 'verdict'], rows),
        '',
        f'{name_of(result["network"])}, batch {result["network"]["batch"]}, random images in an '
        '.npz, crops and flips on, evaluation off; the metrics are those of '
        f'{result["log_every"]} steps, so that the time to the first holds the steps as well. '
        '"Outside": of all that `main.py` does between the end of its first call of the compiled '
        'steps and that of its last, in one process and so at the same time; "more than bare" '
        'compares processes that run one after the other.',
    ]


def outside_calls(calls):
    """Returns the time between calls over that of the calls, from the end of the first call on.

    Args:
      calls: [[begin, end], ...] in seconds.
    """
    inside = sum(end - begin for begin, end in calls[1:])
    return (calls[-1][1] - calls[0][1]) / inside - 1


def memory_table(rows):
    """Returns the lines of memory and rematerialisation.

    Args:
      rows: [(network, {side: what `speed_workers.alone` returned}, {side: [seconds]}), ...].
    """
    columns = ['network', 'members', 'batch', '', 'step at its peak, MiB', 'before it, MiB']
    columns += ["PyTorch's peak / it", 's per step']
    lines = []
    for network, sides, seconds in rows:
        peer = next(side for side in sides if side in (EAGER, COMPILED))
        own = {
            side: found['peak'] - found['level'] for side, found in sides.items() if 'peak' in found
        }
        for side, found in sides.items():
            cells = [name_of(network), network['members'], network['batch'], side]
            if side not in own:
                lines.append([*cells, f'out of memory: {found["out_of_memory"]}', *[None] * 3])
                continue
            ratio = f'{own[peer] / own[side]:.3g}' if peer in own else None
            cells += [f'{own[side] / MIB:.0f}', f'{found["level"] / MIB:.0f}', ratio]
            lines.append([*cells, seconds_cell(seconds.get(side))])
    return [
        *markdown(columns, lines),
        '',
        'Each in a process of its own. "Step at its peak": the most memory in use during two '
        'steps, less that just before the first ("before it": libraries, weights, momentum, '
        'images). Times: ensadv with and without rematerialisation in turns.',
    ]
