"""Networks under attack: every example once, in batches over all devices."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from ensadv.attacks import driver, registry
from ensadv.cpu import parts
from ensadv.evaluation import on_device
from ensadv.models import ensemble
from ensadv.runtime import distributed
from ensadv.runtime.progress import Bar

REPACK_STEPS = 25  # steps after which, at the latest, fooled examples leave a long attack
FIRST_REPACK = 5  # steps after which they first leave a stage
_VARIED = ('steps', 'rank', 'member')  # settings that one compilation serves all values of


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


class Points(NamedTuple):
    """Where an attack led m examples.

    Attributes:
      worst: float32 [m, H, W, C], where the margin was lowest; the clean image and the start are
        among the points.
      has_gradient: bool [m], as in `Verdicts`.
      iterates: float32 [stops, m, H, W, C], the first restart's current iterates.
    """

    worst: np.ndarray
    has_gradient: np.ndarray
    iterates: np.ndarray


class LongVerdicts(NamedTuple):
    """What a long attack did to n examples, and when.

    Attributes:
      margin: float32 [n], the lowest until the example left.
      has_gradient: as in `Verdicts`.
      fooled_at: int32 [n], gradient steps, over all restarts, when the example first was an error
        (0: as the clean image or at the start); driver.NEVER where it stood.
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


class StagedVerdicts(NamedTuple):
    """What an attack in stages did to n examples, after some of its stages.

    Attributes:
      margin: float32 [n], the lowest until the example left.
      has_gradient: as in `Verdicts`; of what no stage attacked, True.
      felled_by: int32 [n], the number of the stage, from 1, under which the example first was an
        error; 0: as the clean image; driver.NEVER where it stood.
      stages: of each that ended, what a result tells of it: name, attacked (examples), felled,
        accuracy (of all examples, so far) and seconds.
    """

    margin: np.ndarray
    has_gradient: np.ndarray
    felled_by: np.ndarray
    stages: tuple[dict[str, Any], ...]

    @classmethod
    def of_lists(cls, found: Sequence[Any]) -> 'StagedVerdicts':
        """Returns what `to_lists` was called on."""
        margin, informed, felled_by, stages = found
        return cls(
            np.array(margin, np.float32),
            np.array(informed, bool),
            np.array(felled_by, np.int32),
            tuple(stages),
        )

    def to_lists(self) -> list[Any]:
        """Returns what JSON can hold, and processes can send each other."""
        arrays = self.margin, self.has_gradient, self.felled_by
        return [*(array.tolist() for array in arrays), list(self.stages)]


def repack_stops(steps: int) -> list[int]:
    """Returns after which steps of a stage fooled examples leave: ever rarer, as ever fewer do."""
    stops = (FIRST_REPACK * 2**power for power in range(32))
    return [*itertools.takewhile(lambda stop: stop < steps, stops), steps]


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
            for places in self.batches(np.arange(n), n):
                batch = split_places[places], images[places], labels[places]
                columns.append(judge(variables, settings, n, batch))
                robust += int(np.sum(columns[-1].margin > 0))
                seen += len(places)
                bar.set_postfix(accuracy=f'{robust / seen:.3f}', refresh=False)
                bar.update(len(places))
        return Verdicts(*(np.concatenate(column) for column in zip(*columns, strict=True)))

    def _clean_batch(self, variables, settings, n, batch) -> Verdicts:
        del settings
        margin = self.compile(n, 'clean', {}, on_device.clean_batch, 1)(variables, batch)
        return Verdicts(margin, margin, np.ones(len(margin), bool))

    def _attack_batch(self, variables, settings, n, batch) -> Verdicts:
        progress, last_margin, _ = self._whole_attack(variables, settings, n, batch)
        return Verdicts(progress.margin, last_margin, progress.informed)

    def _whole_attack(
        self, variables, settings, n, batch, stops=()
    ) -> tuple[driver.Progress, np.ndarray, list[np.ndarray]]:
        """Attacks a batch to the end of all restarts, whatever falls.

        Returns:
          What came of it, the lowest margin among the restarts' last points, and the first
          restart's iterates after as many steps as each of `stops`.
        """
        attack, steps = _HostAttack(self, variables, settings, n, batch), settings['steps']
        last_margin = np.full(len(batch[0]), np.inf, np.float32)
        iterates = []
        for number in range(settings.get('restarts', 1)):
            if number:
                attack.restart(number)
            pauses = [] if number else [stop for stop in stops if stop < steps]
            for taken, stop in itertools.pairwise((0, *pauses, steps)):
                attack.advance(stop - taken)
                if not number and stop in stops:
                    iterates.append(attack.progress.state.x.copy())
            last_margin = np.minimum(last_margin, attack.progress.last_margin)
        return attack.progress, last_margin, iterates

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
        n, num_steps, restarts = len(labels), settings['steps'], settings.get('restarts', 1)
        points = curve_steps(num_steps)
        stops = sorted({*points, *range(REPACK_STEPS, num_steps, REPACK_STEPS)})
        stay = np.arange(n) < settings['iterate_examples']
        stands, iterate_margin = [], []
        total = n * num_steps * restarts
        with self._progress(total=total, label=label, unit='image step') as bar:
            examples = _or_all(split_places, n), images, labels
            attack = _HostAttack(self, variables, settings, n, examples)
            for number in range(restarts):
                if number:
                    attack.active = np.flatnonzero(attack.stands)
                    attack.restart(number)
                for taken, stop in itertools.pairwise((0, *stops)):
                    attack.advance(stop - taken, bar)
                    if number == 0 and stop in points:
                        stands.append(attack.stands)
                        iterate_margin.append(attack.progress.last_margin[stay])
                    attack.active = np.flatnonzero(attack.stands | (stay & (number == 0)))
                    later = int(np.sum(attack.stands)) * num_steps * (restarts - number - 1)
                    bar.total = bar.n + len(attack.active) * (num_steps - stop) + later
                    bar.set_postfix(robust=f'{np.mean(attack.stands):.3f}', refresh=False)
        progress = attack.progress
        return LongVerdicts(
            progress.margin,
            progress.informed,
            progress.fooled_at,
            points,
            np.stack(stands),
            np.stack(iterate_margin),
        )

    def staged_attack(
        self,
        variables: Any,
        settings: Mapping[str, Any],
        images: np.ndarray,
        labels: np.ndarray,
        label: str,
        *,
        stages: Sequence[registry.Stage],
        split_places: np.ndarray | None = None,
        done: StagedVerdicts | None = None,
        save: Callable[[StagedVerdicts], None] = lambda verdicts: None,
    ) -> StagedVerdicts:
        """Returns what stages, each on what still stands, do to each example.

        A stage with 'draws' attacks a random network's mean over so many, all its images to the
        end; then one further draw, at the worst point that it found, is the verdict. Of a network
        without randomness the draws would be equal, and so one is made.

        Args:
          variables, settings, images, labels, label, split_places: as in `evaluate`.
          stages: in their order.
          done: what `save` was given last, of the same arguments: its stages are not made again.
          save: called when a stage ends.
        """
        n, places = len(labels), _or_all(split_places, len(labels))
        found = done or self._before_stages(variables, images, labels, label)
        for number, stage in enumerate(stages):
            if number < len(found.stages):
                continue
            start = time.monotonic()
            active = np.flatnonzero(found.margin > 0)
            margin, informed = found.margin.copy(), found.has_gradient.copy()
            felled_by = found.felled_by.copy()
            if len(active):
                examples = places[active], images[active], labels[active]
                name = f'{label} {stage.name} ({number + 1}/{len(stages)})'
                progress = self._stage(variables, {**settings, **stage.settings}, n, examples, name,
                                       number)  # fmt: skip
                reached = progress.margin
                if self._in_expectation(stage.settings):
                    reached = self._of_points(variables, progress.x_worst, labels[active], n, name)
                margin[active] = reached
                informed[active] |= progress.informed
                felled_by[active[reached <= 0]] = number + 1
            told = {
                'name': stage.name,
                'attacked': len(active),
                'felled': int(np.sum(felled_by == number + 1)),
                'accuracy': float(np.mean((margin > 0) & informed)),
                'seconds': round(time.monotonic() - start, 3),
            }
            found = StagedVerdicts(margin, informed, felled_by, (*found.stages, told))
            distributed.tell(
                f'{label} {stage.name} ({number + 1}/{len(stages)}): felled {told["felled"]} of '
                f'{told["attacked"]}, accuracy {told["accuracy"]:.4f}, {told["seconds"]:.0f} s'
            )
            save(found)
        return found

    def _in_expectation(self, settings: Mapping[str, Any]) -> bool:
        return 'draws' in settings and self.network.draws is not None

    def _of_points(self, variables, points, labels, n, label) -> np.ndarray:
        """Returns the margins at points float32 [m, H, W, C]."""
        batch = on_device.point_margins_batch
        return self.map_batches(batch, variables, (points, labels), label, n=n)

    def _before_stages(self, variables, images, labels, label) -> StagedVerdicts:
        batch = on_device.clean_scores_batch
        margin = self.map_batches(batch, variables, (images, labels), label)
        errs = margin <= 0
        felled_by = np.where(errs, 0, driver.NEVER).astype(np.int32)
        return StagedVerdicts(margin, errs, felled_by, ())

    def _stage(self, variables, settings, n, examples, label, number) -> driver.Progress:
        """Makes all restarts of a stage on examples that stand, and returns what came of it."""
        restarts, count = settings.get('restarts', 1), len(examples[0])
        n = parts.batch_size(count, self._size(n), examples[1][0].size)
        total = count * settings['steps'] * restarts
        with self._progress(total=total, label=label, unit='image step') as bar:
            # No two stages draw alike.
            attack = _HostAttack(
                self, variables, settings, n, examples, registry.MAX_RESTARTS * number
            )
            for again in range(restarts):
                if again:
                    attack.restart(registry.MAX_RESTARTS * number + again)
                for taken, stop in itertools.pairwise((0, *repack_stops(settings['steps']))):
                    attack.advance(stop - taken, bar)
                    # Where many draws are wrong on average, another one may still be right.
                    stays = self._in_expectation(settings)
                    active = np.flatnonzero(attack.stands | stays)
                    attack.active = active
                    left = settings['steps'] * (restarts - again) - stop
                    bar.total = bar.n + len(active) * left
                    bar.set_postfix(standing=f'{len(active)} of {count}', refresh=False)
        return attack.progress

    def points(
        self,
        variables: Any,
        settings: Mapping[str, Any],
        images: np.ndarray,
        labels: np.ndarray,
        label: str,
        *,
        places: np.ndarray | None = None,
        split_places: np.ndarray | None = None,
        stops: Sequence[int] = (),
    ) -> Points:
        """Returns where an attack led examples, each to its end.

        A loss of `on_device.MEMBER_LOSSES` is climbed to fool every member, so there the margin is
        the largest of the members' ones.

        Args:
          variables, images, labels, label, split_places: as in `evaluate`.
          settings: as in `evaluate`, of an attack with steps.
          places: int [m], the examples that are attacked; None: all.
          stops: numbers of steps, increasing, after which the iterates are kept.
        """
        # Compiled for the batches of `evaluate`, however few places: nothing is compiled anew.
        n, results = len(labels), []
        places, split_places = _or_all(places, n), _or_all(split_places, n)
        with self._progress(total=len(places), label=label, unit='image') as bar:
            for batch in self.batches(places, n):
                examples = split_places[batch], images[batch], labels[batch]
                progress, _, iterates = self._whole_attack(variables, settings, n, examples, stops)
                iterates = np.stack(iterates) if stops else progress.x_worst[None][:0]
                results.append(Points(progress.x_worst, progress.informed, iterates))
                bar.update(len(batch))
        worst, has_gradient, iterates = zip(*results, strict=True)
        return Points(
            np.concatenate(worst), np.concatenate(has_gradient), np.concatenate(iterates, axis=1)
        )

    def log_probs(self, variables: Any, x: np.ndarray, label: str) -> np.ndarray:
        """Returns the ensemble's log-probabilities, float32 [n, classes].

        Args:
          variables: the network's, replicated.
          x: float32 [n, H, W, C], pixels in [0, 1]; or whatever has this length and gives such an
            array for x[int [B]], so that images need not be there all at once.
          label: of the progress.
        """
        return self.map_batches(on_device.log_probs_batch, variables, (x,), label)

    def decisions(
        self, variables: Any, x: np.ndarray, labels: np.ndarray, label: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns what the ensemble, and then each of its members, says of images.

        Args:
          variables, x, label: as in `log_probs`.
          labels: int32 [n].

        Returns:
          Predicted classes, int32 [n, 1 + k], and the labels' margins, float32 [n, 1 + k].
        """
        return self.map_batches(on_device.decisions_batch, variables, (x, labels), label)

    def member_margins(
        self, variables: Any, images: np.ndarray, labels: np.ndarray, label: str
    ) -> np.ndarray:
        """Returns each member's margin on each image, float32 [n, k].

        Args:
          variables, images, labels, label: as in `evaluate`.
        """
        return self.map_batches(on_device.member_batch, variables, (images, labels), label)

    def map_batches(
        self,
        f: Callable[..., Any],
        variables: Any,
        arrays: Sequence[Any],
        label: str,
        *,
        settings: Mapping[str, Any] | None = None,
        n: int | None = None,
    ) -> Any:
        """Returns what a function of `on_device` gives for all examples, batch after batch.

        Args:
          f: (network, settings, variables, batch) -> a tree of arrays [B, ...].
          variables: the network's, replicated.
          arrays: what a batch has, each of as many examples; or whatever has this length and gives
            such an array for places int32 [B], so that images need not be there all at once.
          label: of the progress.
          settings: of f.
          n: examples for whose batches f is compiled, where these are only some of them.

        Returns:
          The tree, of NumPy arrays with all examples.
        """
        total = len(arrays[0])
        n, results = n or total, []
        step = self.compile(n, f.__name__, settings or {}, f, 1)
        with self._progress(total=total, label=label, unit='image') as bar:
            for places in self.batches(np.arange(total), n):
                results.append(step(variables, tuple(array[places] for array in arrays)))
                bar.update(len(places))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *results)

    @contextlib.contextmanager
    def _progress(self, *, total: int, label: str, unit: str) -> Iterator[Bar]:
        """Gives a bar, on which what is called inside says that it compiles."""
        with Bar(total=total, label=label, unit=unit) as self._bar:
            yield self._bar

    def _size(self, n: int) -> int:
        """Returns how many examples a call over all devices takes, where there are n in all."""
        devices = distributed.num_devices()
        return -(-min(self._batch_size, n) // devices) * devices

    def batches(self, places: np.ndarray, n: int) -> Iterator[np.ndarray]:
        """Yields `places`, some of n, in batches; all but the last are of one size."""
        size = self._size(n)
        for first in range(0, len(places), size):
            yield places[first : first + size].astype(np.int32)

    def compile(
        self, n: int, name: str, settings: Mapping[str, Any], f: Callable[..., Any], num_shared: int
    ) -> Callable[..., Any]:
        """Returns f(network, settings, ...) compiled; one serves every number of steps.

        Its last argument is a batch, of n examples in all. It is padded to the size that f is
        compiled for, of which the result shows nothing.
        """
        passed_over = (*_VARIED, 'restarts', 'seed', 'iterate_examples')
        rest = {key: value for key, value in settings.items() if key not in passed_over}
        kind = f'{name} {rest}'

        def of_batch(*args):
            *shared, (is_example, batch) = args
            of_part = partial(f, self.network, rest, *shared)
            return parts.by_network(of_part, batch, wanted=is_example)

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


class _HostAttack:
    """An attack on examples of any number: its progress is on the host, and batches go out from it.

    Attributes:
      active: int [m], the places of the examples that are attacked further.
      progress: of all examples, as NumPy arrays.
    """

    def __init__(self, evaluator, variables, settings, n, examples, number=0):
        """Starts the first restart.

        Args:
          evaluator: compiles and makes batches.
          variables, settings: as in `Evaluator.evaluate`.
          n: examples in all, which the size of the batches is for.
          examples: their places in the split, images and labels.
          number: of the start.
        """
        self._evaluator, self._examples, self._n = evaluator, examples, n
        compile_ = lambda name, f, shared: evaluator.compile(n, name, settings, f, shared)
        self._begin = compile_('begin', on_device.begin_batch, 4)
        self._restart = compile_('restart', on_device.restart_batch, 4)
        self._advance = compile_('advance', on_device.advance_batch, 3)
        varied = {key: np.int32(settings[key]) for key in _VARIED if key in settings}
        self._shared = variables, varied
        self._seed = np.int32(settings['seed'])
        self.active = np.arange(len(examples[0]))
        self.progress: driver.Progress | None = None
        for batch in evaluator.batches(self.active, n):
            shared = *self._shared, self._seed, np.int32(number)
            self._put(batch, self._begin(*shared, self._take(batch)))

    @property
    def stands(self) -> np.ndarray:
        """bool [n]: not fooled so far."""
        return self.progress.margin > 0

    def restart(self, number: int) -> None:
        """Begins the restart with this number, from 1, of the active examples."""
        shared = *self._shared, self._seed, np.int32(number)
        for batch in self._evaluator.batches(self.active, self._n):
            given = *self._take(batch), self._progress_of(batch)
            self._put(batch, self._restart(*shared, given))

    def advance(self, count: int, bar: Bar | None = None) -> None:
        """Takes so many steps of the active examples."""
        shared = *self._shared, np.int32(count)
        for batch in self._evaluator.batches(self.active, self._n):
            given = *self._take(batch), self._progress_of(batch)
            self._put(batch, self._advance(*shared, given))
            if bar is not None:
                bar.update(len(batch) * count)

    def _take(self, places: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(array[places] for array in self._examples)

    def _progress_of(self, places: np.ndarray) -> driver.Progress:
        return jax.tree.map(lambda leaf: leaf[places], self.progress)

    def _put(self, places: np.ndarray, progress: driver.Progress) -> None:
        """Takes in the progress of the examples at these places."""
        if self.progress is None:
            make = lambda leaf: np.zeros((len(self._examples[0]), *leaf.shape[1:]), leaf.dtype)
            self.progress = jax.tree.map(make, progress)

        def put_leaf(everyone, some):
            everyone[places] = some

        jax.tree.map(put_leaf, self.progress, progress)


def _or_all(places, n):
    return np.arange(n, dtype=np.int32) if places is None else np.asarray(places, np.int32)
