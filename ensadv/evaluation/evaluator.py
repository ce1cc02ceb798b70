"""Networks under attack: every example once, in batches over all devices."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ensadv import losses, prng
from ensadv.attacks import driver
from ensadv.cpu import parts
from ensadv.data import batches
from ensadv.evaluation import attack_settings
from ensadv.models import ensemble
from ensadv.runtime import distributed
from ensadv.runtime.progress import Bar

REPACK_STEPS = 25  # steps after which, at the latest, fooled examples leave a long attack


class Verdicts(NamedTuple):
    """What an attack did to n examples.

    Attributes:
      margin: float32 [n], the lowest over all steps and restarts.
      last_margin: float32 [n], the lowest among the restarts' last iterates.
      has_gradient: bool [n], whether any step's gradient was finite and not zero.
    """

    margin: np.ndarray
    last_margin: np.ndarray
    has_gradient: np.ndarray


class LongVerdicts(NamedTuple):
    """What a long attack did to n examples, and when.

    Attributes:
      margin: float32 [n], the lowest until the example left.
      has_gradient: as in `Verdicts`.
      fooled_at: int32 [n], gradient steps, over all restarts, when the example first was an error
        (0: as the clean image or at the start); attacks.NEVER where it stood.
      steps: the numbers of steps of the curve, which is that of the first restart.
      stands: bool [len(steps), n], whether no iterate so far was an error.
      iterate_margin: float32 [len(steps), m], the current iterate's, of the m examples that stayed.
    """

    margin: np.ndarray
    has_gradient: np.ndarray
    fooled_at: np.ndarray
    steps: tuple[int, ...]
    stands: np.ndarray
    iterate_margin: np.ndarray


def curve_steps(num_steps: int) -> tuple[int, ...]:
    """Returns 1, 2, 5, 10, 20, 50, ... up to the attack's number of steps, which is the last."""
    steps = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    return (*itertools.takewhile(lambda step: step < num_steps, steps), num_steps)


class Evaluator:
    """Evaluates a network's weights on uint8 images.

    Results depend neither on the batch size nor on the devices, except by rounding: each example
    has a key of its own, made from its place, and the last batch's padding is dropped.
    """

    def __init__(self, network: ensemble.Network, batch_size: int):
        """Compiles nothing yet.

        Args:
          network: what is evaluated.
          batch_size: examples per call over all devices, at most; where the devices do not divide
            it, a little more.
        """
        self.network = network
        self._batch_size = batch_size
        self._compiled: dict[str, Callable[..., Any]] = {}
        self._called: set[tuple[str, int]] = set()  # the functions and batch sizes that were
        self._bar: Bar | None = None

    def evaluate(
        self,
        variables: Any,
        settings: Mapping[str, Any],
        images: np.ndarray,
        labels: np.ndarray,
        label: str,
        *,
        split_places: np.ndarray | None = None,
    ) -> Verdicts:
        """Returns what an attack, or none, does to each example.

        Args:
          variables: the network's, replicated.
          settings: see `attack_settings`; without 'steps' the images are taken as they are.
          images: uint8 [n, H, W, C].
          labels: int32 [n].
          label: of the progress.
          split_places: int32 [n], the examples' places in their split, which their keys are made
            from, so that an example is attacked alike whichever others are evaluated; None: 0 to
            n - 1.
        """
        judge = self._attack_batch if 'steps' in settings else self._clean_batch
        n, columns = len(labels), []
        split_places = _or_all(split_places, n)
        robust = seen = 0
        with self._progress(total=n, label=label, unit='image') as bar:
            for places in self._batches(np.arange(n), n):
                batch = split_places[places], images[places], labels[places]
                columns.append(judge(variables, settings, n, batch))
                robust += int(np.sum(columns[-1].margin > 0))
                seen += len(places)
                bar.set_postfix(accuracy=f'{robust / seen:.3f}', refresh=False)
                bar.update(len(places))
        return Verdicts(*(np.concatenate(column) for column in zip(*columns, strict=True)))

    def _clean_batch(self, variables, settings, n, batch) -> Verdicts:
        del settings
        margin = self._compile(n, 'clean', {}, _clean_batch, 1)(variables, batch)
        return Verdicts(margin, margin, np.ones(len(margin), bool))

    def _attack_batch(self, variables, settings, n, batch) -> Verdicts:
        """Attacks a batch by the parts of `long_attack`, so that they are compiled once."""
        begin, restart, advance = self._compile_attack(n, settings)
        num_steps = np.int32(settings['steps'])
        progress = begin(variables, batch)
        last_margin = np.full(len(progress.margin), np.inf, np.float32)
        for number in range(settings['restarts']):
            progress = restart(np.int32(number), (*batch, progress))
            progress = advance(variables, num_steps, num_steps, (*batch, progress))
            last_margin = np.minimum(last_margin, progress.last_margin)
        return Verdicts(progress.margin, last_margin, progress.has_gradient)

    def _compile_attack(
        self, n: int, settings: Mapping[str, Any]
    ) -> tuple[Callable[..., Any], ...]:
        return (
            self._compile(n, 'begin', settings, _begin_batch, 1),
            self._compile(n, 'restart', settings, _restart_batch, 1),
            self._compile(n, 'advance', settings, _advance_batch, 3),
        )

    def long_attack(
        self,
        variables: Any,
        settings: Mapping[str, Any],
        images: np.ndarray,
        labels: np.ndarray,
        label: str,
        *,
        split_places: np.ndarray | None = None,
    ) -> LongVerdicts:
        """Returns the verdicts of `evaluate`, and when each example fell, for less.

        Examples that are fooled leave and the rest are packed into full batches, so that the cost
        falls with the robust accuracy. But the first settings['iterate_examples'] stay in the first
        restart, for the current iterate. Each example meets the same start and the same steps as
        in `evaluate`, whoever shares its batch.

        Args:
          variables, settings, images, labels, label, split_places: as in `evaluate`.
        """
        n, num_steps, restarts = len(labels), settings['steps'], settings['restarts']
        split_places = _or_all(split_places, n)
        begin, restart, advance = self._compile_attack(n, settings)
        points = curve_steps(num_steps)
        stops = sorted({0, *points, *range(REPACK_STEPS, num_steps, REPACK_STEPS)})
        stay = np.arange(n) < settings['iterate_examples']
        stands, iterate_margin = [], []
        packed = _Packed(n)

        def over(places, count, f, *shared):
            for batch in self._batches(places, n):
                examples = split_places[batch], images[batch], labels[batch], packed.take(batch)
                packed.put(batch, f(*shared, examples))
                bar.update(len(batch) * count)

        total = n * num_steps * restarts
        with self._progress(total=total, label=label, unit='image step') as bar:
            for batch in self._batches(np.arange(n), n):
                examples = split_places[batch], images[batch], labels[batch]
                packed.put(batch, begin(variables, examples))
            for number in range(restarts):
                active = np.flatnonzero(packed.stands) if number else np.arange(n)
                over(active, 0, restart, np.int32(number))
                for taken, stop in itertools.pairwise(stops):
                    count = np.int32(stop - taken)
                    over(active, count, advance, variables, np.int32(num_steps), count)
                    if number == 0 and stop in points:
                        stands.append(packed.stands)
                        iterate_margin.append(packed.progress.last_margin[stay])
                    go_on = packed.stands if number else packed.stands | stay
                    active = np.flatnonzero(go_on)
                    later = int(np.sum(packed.stands)) * num_steps * (restarts - number - 1)
                    bar.total = bar.n + len(active) * (num_steps - stop) + later
                    bar.set_postfix(robust=f'{np.mean(packed.stands):.3f}', refresh=False)
        progress = packed.progress
        return LongVerdicts(
            progress.margin,
            progress.has_gradient,
            progress.fooled_at,
            points,
            np.stack(stands),
            np.stack(iterate_margin),
        )

    def transfer_attack(
        self,
        variables: Any,
        settings: Mapping[str, Any],
        images: np.ndarray,
        labels: np.ndarray,
        places: np.ndarray,
        label: str,
        *,
        split_places: np.ndarray | None = None,
    ) -> np.ndarray:
        """Returns adversarial examples, float32 [m, H, W, C], that every member is to err on.

        The point kept is the one where the largest of the members' margins is lowest.

        Args:
          variables, images, labels, label, split_places: as in `evaluate`.
          settings: as in `evaluate`, with 'loss' one of `TRANSFER_LOSSES`.
          places: int [m], the examples that are attacked.
        """
        # One compilation serves every round.
        varied = ('steps', 'restarts', 'seed')
        same = {name: value for name, value in settings.items() if name not in varied}
        numbers = {name: np.int32(settings[name]) for name in varied}
        # Few examples are left in the end: powers of two are few sizes to compile.
        n = 1 << (len(places) - 1).bit_length()
        step = self._compile(n, 'transfer', same, _transfer_batch, 2)
        split_places, results = _or_all(split_places, len(labels)), []
        with self._progress(total=len(places), label=label, unit='image') as bar:
            for batch in self._batches(places, n):
                examples = split_places[batch], images[batch], labels[batch]
                results.append(step(variables, numbers, examples))
                bar.update(len(batch))
        return np.concatenate(results)

    def worst_points(
        self,
        variables: Any,
        settings: Mapping[str, Any],
        images: np.ndarray,
        labels: np.ndarray,
        label: str,
        *,
        places: np.ndarray | None = None,
        split_places: np.ndarray | None = None,
    ) -> np.ndarray:
        """Returns where the attack of `evaluate` found the lowest margins, [m, H, W, C] float32.

        The clean image and the start are among the points. The attack stops after each step, so
        that what `evaluate` compiled serves here too; an iterate costs one more forward pass.

        Args:
          variables, images, labels, label, split_places: as in `evaluate`.
          settings: as in `evaluate`, of an attack with steps.
          places: int [m], the examples that are attacked; None: all.
        """
        # Compiled for the batches of `evaluate`, however few places: nothing is compiled anew.
        n = len(labels)
        begin, restart, advance = self._compile_attack(n, settings)
        places, split_places = _or_all(places, n), _or_all(split_places, n)
        num_steps, restarts = settings['steps'], settings['restarts']
        results = []
        total = len(places) * num_steps * restarts
        with self._progress(total=total, label=label, unit='image step') as bar:
            for batch in self._batches(places, n):
                examples = split_places[batch], images[batch], labels[batch]
                x_worst = images[batch] / np.float32(255)
                progress = begin(variables, examples)
                margin = progress.margin
                for number, taken in itertools.product(range(restarts), range(num_steps + 1)):
                    if taken == 0:
                        progress = restart(np.int32(number), (*examples, progress))
                    # None at first: then the start is judged, and nothing else is done.
                    count = np.int32(min(taken, 1))
                    given = (*examples, progress)
                    progress = advance(variables, np.int32(num_steps), count, given)
                    lower = progress.last_margin < margin
                    x_worst[lower] = progress.x_adv[lower]
                    margin = np.where(lower, progress.last_margin, margin)
                    bar.update(len(batch) * int(count))
                results.append(x_worst)
        return np.concatenate(results)

    def log_probs(self, variables: Any, x: np.ndarray, label: str) -> np.ndarray:
        """Returns the ensemble's log-probabilities, float32 [n, classes].

        Args:
          variables: the network's, replicated.
          x: float32 [n, H, W, C], pixels in [0, 1]; or whatever has this length and gives such an
            array for x[int [B]], so that images need not be there all at once.
          label: of the progress.
        """
        n = len(x)
        step = self._compile(n, 'log_probs', {}, _log_probs_batch, 1)
        results = []
        with self._progress(total=n, label=label, unit='image') as bar:
            for batch in self._batches(np.arange(n), n):
                results.append(step(variables, x[batch]))
                bar.update(len(batch))
        return np.concatenate(results)

    def member_margins(
        self, variables: Any, images: np.ndarray, labels: np.ndarray, label: str
    ) -> np.ndarray:
        """Returns each member's margin on each image, float32 [n, k].

        Args:
          variables, images, labels, label: as in `evaluate`.
        """
        n = len(labels)
        step = self._compile(n, 'members', {}, _member_batch, 1)
        results = []
        with self._progress(total=n, label=label, unit='image') as bar:
            for batch in self._batches(np.arange(n), n):
                results.append(step(variables, (batch, images[batch], labels[batch])))
                bar.update(len(batch))
        return np.concatenate(results)

    @contextlib.contextmanager
    def _progress(self, *, total: int, label: str, unit: str) -> Iterator[Bar]:
        """Gives a bar, on which what is called inside says that it compiles."""
        with Bar(total=total, label=label, unit=unit) as self._bar:
            yield self._bar

    def _size(self, n: int) -> int:
        """Returns how many examples a call over all devices takes, where there are n in all."""
        devices = distributed.num_devices()
        return -(-min(self._batch_size, n) // devices) * devices

    def _batches(self, places: np.ndarray, n: int) -> Iterator[np.ndarray]:
        """Yields `places`, some of n, in batches; all but the last are of one size."""
        size = self._size(n)
        for first in range(0, len(places), size):
            yield places[first : first + size].astype(np.int32)

    def _compile(
        self, n: int, name: str, settings: Mapping[str, Any], f: Callable[..., Any], num_shared: int
    ) -> Callable[..., Any]:
        """Returns f(network, settings, ...) compiled; one serves every number of steps.

        Its last argument is a batch, of n examples in all. It is padded to the size that f is
        compiled for, of which the result shows nothing.
        """
        varied = ('steps', 'restarts', 'iterate_examples')
        rest = {key: value for key, value in settings.items() if key not in varied}
        kind = f'{name} {rest}'

        def of_batch(*args):
            *shared, (is_example, batch) = args
            of_part = partial(f, self.network, rest, *shared)
            fewest = self.network.images_at_a_time
            return parts.by_network(of_part, batch, fewest=fewest, wanted=is_example)

        if kind not in self._compiled:
            self._compiled[kind] = distributed.map_examples(of_batch, num_shared)
        compiled, size = self._compiled[kind], self._size(n)

        def call(*args):
            *shared, batch = args
            count = len(jax.tree.leaves(batch)[0])

            def pad(leaf):
                # The last one again and again, since zeros might be no example.
                widths = [(0, size - count), *[(0, 0)] * (leaf.ndim - 1)]
                return np.pad(leaf, widths, mode='edge')

            given = np.arange(size) < count, jax.tree.map(pad, batch)
            compiles = (kind, size) not in self._called
            with self._bar.compiling() if compiles else contextlib.nullcontext():
                result = compiled(*shared, given)
            self._called.add((kind, size))
            return jax.tree.map(lambda leaf: leaf[:count], result)

        return call


class _Packed:
    """A long attack's progress for all n examples, on the host: taken out and put back."""

    def __init__(self, n: int):
        self._n = n
        self.progress: driver.Progress | None = None

    @property
    def stands(self) -> np.ndarray:
        """bool [n]: not fooled so far."""
        return self.progress.margin > 0

    def take(self, places: np.ndarray) -> driver.Progress:
        return jax.tree.map(lambda leaf: leaf[places], self.progress)

    def put(self, places: np.ndarray, progress: driver.Progress) -> None:
        """Takes in the progress of the examples at these places."""
        if self.progress is None:
            self.progress = jax.tree.map(
                lambda leaf: np.zeros((self._n, *leaf.shape[1:]), leaf.dtype), progress
            )

        def put_leaf(everyone, some):
            everyone[places] = some

        jax.tree.map(put_leaf, self.progress, progress)


# What is compiled: functions of one device's share of a batch, places int32 [B] in the split,
# images uint8 [B, H, W, C] and labels int32 [B].


def _clean_batch(network, settings, variables, batch):
    del settings
    _, images, labels = batch
    return losses.margin(network.log_probs(variables, batches.to_pixels(images)), labels)


def _log_probs_batch(network, settings, variables, x):
    del settings
    return network.log_probs(variables, x)


def _member_batch(network, settings, variables, batch):
    del settings
    _, images, labels = batch
    logits = network.member_logits(variables, batches.to_pixels(images))
    return jax.vmap(losses.margin, (0, None), 1)(logits, labels)


def _or_all(places, n):
    return np.arange(n, dtype=np.int32) if places is None else np.asarray(places, np.int32)


def _keys(settings, places):
    """Returns each example's key: its place's in its split, whatever the batch."""
    key = prng.key(settings['seed'])
    return jax.vmap(lambda place: jax.random.fold_in(key, place))(places)


def _start(settings):
    return {
        'epsilon': settings['epsilon'],
        'start_from': settings['start'],
        'sigma': settings['sigma'],
    }


def _begin_batch(network, settings, variables, batch):
    _, images, labels = batch
    # The step's state at its beginning does not depend on the number of steps.
    step = attack_settings.attack_step(settings, 1)
    predict = lambda x: network.log_probs(variables, x)
    x = batches.to_pixels(images)
    return driver.begin(predict, x, labels, step=step, start_from=settings['start'])


def _restart_batch(network, settings, number, batch):
    del network
    places, images, _, progress = batch
    x, step = batches.to_pixels(images), attack_settings.attack_step(settings, 1)
    return driver.restart(
        progress, _keys(settings, places), x, number, step=step, **_start(settings)
    )


def _advance_batch(network, settings, variables, num_steps, count, batch):
    _, images, labels, progress = batch
    return driver.advance(
        lambda x: network.log_probs(variables, x),
        progress,
        batches.to_pixels(images),
        labels,
        step=attack_settings.attack_step(settings, num_steps),
        num_steps=count,
        epsilon=settings['epsilon'],
        # The network gives log-probabilities.
        loss=losses.LOSSES[settings['loss']],
    )


def _best_margin(member_logits, labels):
    """Returns the margin of whichever member is the furthest from an error, float32 [B]."""
    margins = jax.vmap(losses.margin, (0, None))(member_logits, labels)
    # As in losses.margin: the gradient of max is not to be trusted.
    furthest = jnp.argmax(jax.lax.stop_gradient(margins), axis=0)
    return jnp.take_along_axis(margins, furthest[None], axis=0)[0]


# What a transfer attack climbs: functions of the members' logits [k, B, classes] and labels [B].
TRANSFER_LOSSES = {
    # The cross-entropy of the members' mean logits, as in the paper.
    'mean_logits': lambda logits, labels: losses.cross_entropy(
        ensemble.combine(logits, 'logits'), labels
    ),
    # The margin of the member that still stands: what is left when the mean is fooled already.
    'best_margin': lambda logits, labels: -_best_margin(logits, labels),
}


def _transfer_batch(network, settings, variables, numbers, batch):
    settings = settings | numbers
    places, images, labels = batch
    outcome = driver.worst_case(
        lambda x: network.member_logits(variables, x),
        _keys(settings, places),
        batches.to_pixels(images),
        labels,
        step=attack_settings.attack_step(settings, settings['steps']),
        num_steps=settings['steps'],
        **_start(settings),
        restarts=settings['restarts'],
        loss=TRANSFER_LOSSES[settings['loss']],
        judge=_best_margin,
    )
    return outcome.x_adv
