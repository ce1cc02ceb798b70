"""The watch for catastrophic overfitting in training with an attack of one step.

A network may suddenly learn to resist that one step and nothing else (Wong et al., 2020). Its
accuracy under the step then rises, while that under two smaller steps falls to nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import Array
from ml_collections import ConfigDict

from ensadv import losses
from ensadv.attacks import registry
from ensadv.cpu import order
from ensadv.errors import TrainingError
from ensadv.runtime import distributed
from ensadv.training import feeds, from_config, streams
from ensadv.training.optim import TrainState
from ensadv.training.step import attack_images, attacked

SINGLE, TWO = 'single_step_accuracy', 'two_step_accuracy'
_OVER = 0.5  # of train.overfitting_gap: a network that is closer than this has recovered
_HELP = (
    'In a new workdir N-FGSM (attack.name=n_fgsm), more noise in it, or an attack of several steps '
    'prevents it'
)


class OverfittingError(TrainingError):
    """Training that stops because of catastrophic overfitting, at `step`."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


def is_watched(config: ConfigDict) -> bool:
    """Returns whether training attacks with one step."""
    one_step = registry.training_settings(config.attack)['steps'] == 1
    return one_step and from_config.objective(config).attacks


def make_accuracies(
    config: ConfigDict, model: nn.Module, draw: feeds.Draw
) -> Callable[..., dict[str, Array]]:
    """Returns the compiled `(state, examples, keys, chosen) -> {SINGLE, TWO}`.

    The accuracies, float32 [learners] each, are of the batch that the next step takes, and of what
    that step attacks, with the noise that it draws. Training goes on as if nobody had looked.

    Args:
      config: the run's.
      model: the members' network.
      draw: see `feeds.draw`; `examples` and `chosen` are what a feed's `take` gives it.
    """
    settings = from_config.step_settings(config, model)
    attacks = {SINGLE: settings['attack'], TWO: from_config.two_step_attack(config)}
    names = ('model', 'combine', 'attack_batch_norm', 'objective')
    settings = {name: settings[name] for name in names}

    def of_one(state: TrainState, keys: streams.Keys, chosen: Any, examples: Any):
        batch, rng = draw(state.step, 0, examples, chosen, keys)
        predict = attacked(model, settings['combine'], state, settings['attack_batch_norm'])
        y = losses.labels_of(batch[1])
        found = {}
        for name, attack in attacks.items():
            x_adv = attack_images(state, batch, rng, attack=attack, **settings)
            found[name] = jnp.mean(losses.margin(predict(x_adv), y) > 0)
        return found

    def of_all(state, examples, keys, chosen):
        if config.ensemble.training == 'separate':
            found = order.each_learner(lambda *one: of_one(*one, examples), state, keys, chosen)
        else:
            found = jax.tree.map(lambda leaf: leaf[None], of_one(state, keys, chosen, examples))
        return distributed.mean_over_devices(found)

    return distributed.run_on_devices(of_all, 3, divided=True)


def make_look(
    config: ConfigDict,
    model: nn.Module,
    draw: feeds.Draw,
    take: Callable[[int, int], tuple[Any, Any]],
    keys: streams.Keys,
) -> Callable[[int, TrainState], dict[str, float]]:
    """Returns `(step, state) -> metrics` of the watch; none where training is not watched.

    Args:
      config, model, draw: see `make_accuracies`.
      take: of the run's feed.
      keys: of all devices.
    """
    if not is_watched(config):
        return lambda step, state: {}
    watch, accuracies = Watch(config), make_accuracies(config, model, draw)

    def look(step, state):
        examples, chosen = take(step, 1)
        return watch.metrics(step, accuracies(state, examples, keys, chosen))

    return look


class Watch:
    """Tells once of each onset of catastrophic overfitting, and stops training if asked to."""

    def __init__(self, config: ConfigDict):
        self._gap = config.train.overfitting_gap
        self._stops = config.train.stop_on_overfitting
        self._told = False

    def metrics(self, step: int, accuracies: Mapping[str, Array]) -> dict[str, float]:
        """Returns the accuracies' means over the learners: the ensemble, or its members.

        Args:
          step: the state's.
          accuracies: as the function of `make_accuracies` gives them.

        Raises:
          OverfittingError: if a gap is too wide, and training is to stop there.
        """
        single, two = (np.asarray(jax.device_get(accuracies[name])) for name in (SINGLE, TWO))
        worst = int(np.argmax(single - two))
        gap = single[worst] - two[worst]
        if gap > self._gap and not self._told:
            self._told = True
            who = f' of member {worst}' if len(single) > 1 else ''
            message = (
                f'step {step}: catastrophic overfitting{who}: on a training batch the accuracy is '
                f"{single[worst]:.2f} under the training attack's single step and {two[worst]:.2f} "
                'under two steps'
            )
            if self._stops:
                raise OverfittingError(message, step)
            if distributed.is_main():
                logging.warning(
                    '%s. %s; train.stop_on_overfitting=True stops training there', message, _HELP
                )
        elif gap < _OVER * self._gap:
            self._told = False
        return {SINGLE: float(np.mean(single)), TWO: float(np.mean(two))}


def error_with_advice(error: OverfittingError, newest: int) -> TrainingError:
    """Returns the error together with how to go on.

    Args:
      error: as it was raised.
      newest: step of the newest checkpoint, which has a snapshot, or 0 if there is none.
    """
    if newest >= error.step:
        kept = 'The newest checkpoint is of this step, and no good one is left'
    elif not newest:
        kept = 'There is no checkpoint from before'
    else:
        kept = (
            f'Checkpoint and snapshot of step {newest} are from before, and stay: --mode=evaluate '
            'evaluates it, and with --config.train.stop_on_overfitting=False the same command '
            'goes on from it'
        )
    return TrainingError(f'{error}. {kept}. {_HELP}')
