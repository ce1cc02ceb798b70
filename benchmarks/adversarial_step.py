"""A whole adversarial training step, ours and PyTorch's: compared, then timed. For speed.py.

Both get the same members, running averages, momentum, images, labels and attack noise. Ours is the
function that training calls (`train.make_train_steps`: a loop of traced length, donated state),
several steps in a call as training makes them (`train.steps_per_call`), with crops and flips off;
the peer is `peer_pytorch.train_step` (channels_last, oneDNN, eager or compiled).

Signs of tiny gradients and ReLUs at zero are a matter of rounding, and the steps of an attack
amplify them: on a few images the two attacks (or two compilations of one of them) part. So each
step of the attack is compared from the same iterate, and the update from the same x_adv.
"""

import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from benchmarks import peer_pytorch
from benchmarks.speed_tables import OURS
from configs import default
from ensadv import build, config_checks
from ensadv.attacks import registry
from ensadv.attacks.threat_model import ThreatModel
from ensadv.data import batches
from ensadv.models import ensemble
from ensadv.runtime import distributed
from ensadv.training import from_config, streams, train
from ensadv.training.step import train_step

# Between the losses of a timed step, clean and adversarial, by the type that both compute in.
ALLOWED_LOSSES = {'float32': (1e-4, 1e-2), 'bfloat16': (5e-2, 2e-1)}
SHAPE, CLASSES = (32, 32, 3), 10
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10


class Ours:
    """Our side, and the state and batch that both sides start from."""

    def __init__(self, config):
        rng = np.random.default_rng(0)
        self.config = config
        keys = streams.learner_keys(config)
        description = {'num_classes': CLASSES, 'mean': MEAN, 'std': STD}
        group = config.model
        self.model = build.model(config, description, dtype=group.dtype, remat=group.remat)
        size = config.train.batch_size
        images = rng.integers(0, 256, (size, *SHAPE), np.uint8)
        labels = rng.integers(0, CLASSES, size, np.int32)
        self.arrays = distributed.replicate((images, labels))

        def noisy(tree, scale):
            """Nothing is to be zero or one, so that nothing can be forgotten or mixed up."""
            noise = lambda leaf: scale * rng.standard_normal(leaf.shape, np.float32)
            return jax.tree.map(lambda leaf: np.asarray(leaf) + noise(leaf), tree)

        state = jax.jit(lambda keys: train.init_state(config, self.model, SHAPE, keys))(keys)
        momentum = noisy(optax.tree.get(state.opt_state, 'trace'), 1e-3)
        self.start = state.replace(
            params=noisy(state.params, 0.05),
            batch_stats=noisy(state.batch_stats, 0.1),
            opt_state=optax.tree.set(jax.device_get(state.opt_state), trace=momentum),
        )
        self.state, self.keys = distributed.replicate((jax.tree.map(jnp.array, self.start), keys))
        self.compiled = train.make_train_steps(config, self.model, None)

    def batch(self):
        """Returns images, labels and the attack's keys of the first step, as training has them."""
        images, labels = self.arrays
        size = len(labels)
        places = jnp.arange(size)
        indices = batches.batch_indices(
            self.keys.batches, 0, places, batch_size=size, num_examples=size
        )
        key = jax.random.fold_in(self.keys.attack, 0)
        keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(places)
        return batches.to_pixels(images[indices]), labels[indices], keys

    def noise(self):
        """Returns the noise that the first step's attack starts with."""
        x, _, keys = self.batch()
        group, zeros = self.config.attack, jnp.zeros_like(x)
        threat = ThreatModel(self.config.norm, self.config.epsilon)
        made = registry.make({'attack': group.name, **group.to_dict()})
        return made.init(None, threat, keys, zeros + 0.5, None).x - 0.5

    def log_probs(self, state, x):
        """The ensemble's log-probabilities, with running averages."""
        variables = {'params': state.params, 'batch_stats': state.batch_stats}
        logits = ensemble.apply(self.model, variables, x)
        return ensemble.combine(logits, self.config.ensemble.combine)

    def iterates(self):
        """Returns the first step's attack, x_0 to x_N."""

        @jax.jit
        def iterate(state, x, y, keys, num_steps):
            log_probs = lambda x: self.log_probs(state, x)
            attack = from_config.training_attack(self.config)
            return attack(log_probs, keys, x, y, num_steps=num_steps)

        return [iterate(self.start, *self.batch(), n) for n in range(self.config.attack.steps + 1)]

    def update(self, x_adv):
        """Returns the state and metrics after a step from the start, were x_adv its attack's."""
        config = self.config

        @jax.jit
        def step(state, x, y, keys, x_adv):
            return train_step(
                state, (x, y), keys,
                model=self.model, optimizer=from_config.optimizer(config),
                combine=config.ensemble.combine, attack=lambda *_: x_adv,
                objective=from_config.objective(config),
            )  # fmt: skip

        return step(self.start, *self.batch(), x_adv)

    def step(self, num_steps=1):
        """Makes steps as training does; returns the sums of their metrics."""
        self.state, sums = self.compiled(self.state, self.arrays, self.keys, np.int32(num_steps))
        return {name: float(value) for name, value in sums.items()}


class Peer:
    """The peer's side, from the same start.

    `device` is PyTorch's name of it. Where ours computes in bfloat16 the peer does by autocast.
    """

    def __init__(self, ours, compiled=False, device='cpu'):
        config = ours.config
        self.compiled, self.device = compiled, device
        self.dtype = config.model.dtype
        depth, width, k = config.model.depth, config.model.width, config.ensemble.size
        self.ensemble = peer_pytorch.Ensemble(depth, width, k, CLASSES, MEAN, STD)
        peer_pytorch.load(self.ensemble, ours.start.params, ours.start.batch_stats)
        self.ensemble.to(device)
        self.optimizer = peer_pytorch.make_optimizer(
            self.ensemble, config.train.learning_rate, config.train.momentum,
            config.train.weight_decay,
        )  # fmt: skip
        momentum = peer_pytorch.state_dict(optax.tree.get(ours.start.opt_state, 'trace'))
        for name, parameter in self.ensemble.named_parameters():
            buffer = torch.empty_like(parameter).copy_(torch.tensor(momentum[name]))
            self.optimizer.state[parameter]['momentum_buffer'] = buffer
        self.model = torch.compile(self.ensemble) if compiled else self.ensemble
        x, y, _ = ours.batch()
        self.x, self.y = self.images(x), torch.tensor(np.array(y)).long().to(device)
        self.settings = {
            'steps': config.attack.steps,
            'step_size': config.attack.step_size,
            'epsilon': config.epsilon,
            'sigma': config.attack.sigma,
        }

    def images(self, array):
        """Puts images [B, H, W, C] on the device, as the peer takes them."""
        return peer_pytorch.images(np.array(array)).to(self.device)

    def attack(self, start, **settings):
        """Returns the attack's last iterate from x + start, [B, H, W, C]."""
        start = self.images(start)
        settings = self.settings | settings
        x_adv = peer_pytorch.attack(self.ensemble, self.x, self.y, start=start, **settings)
        return x_adv.permute(0, 2, 3, 1).cpu().numpy()

    def update(self, x_adv):
        """Updates in place, were x_adv the attack's; returns metrics."""
        x_adv = self.images(x_adv)
        return peer_pytorch.update(self.ensemble, self.optimizer, self.x, x_adv, self.y)

    def step(self, num_steps=1, start=None):
        """Makes steps in place; returns the last one's metrics.

        Each draws its attack's noise unless that is given, `start`.
        """
        if start is not None:
            start = self.images(start)
        bfloat16 = self.dtype == 'bfloat16'
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=bfloat16):
            for _ in range(num_steps):
                metrics = peer_pytorch.train_step(
                    self.ensemble, self.optimizer, self.x, self.y, model=self.model, start=start,
                    **self.settings,
                )  # fmt: skip
        return metrics


def compare(ours, device='cpu'):
    """Compares what both compute in the first step, in float32.

    Args:
      ours: our side.
      device: the peer's, PyTorch's name of it.

    Returns:
      [(what, the largest difference, the largest allowed), ...]
    """
    peer = Peer(ours, device=device)
    x, noise = np.asarray(ours.batch()[0]), ours.noise()
    sizes = {}  # values per channel in each batch norm
    for name, module in peer.ensemble.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(
                lambda _, args, out, name=name: sizes.update({name: out[:, 0].numel()})
            )
    with torch.no_grad():
        log_probs = peer.ensemble.eval()(peer.x).cpu().numpy()
    found = [
        ('log-probabilities', _largest(log_probs, jax.jit(ours.log_probs)(ours.start, x)), 1e-4)
    ]

    iterates = [np.asarray(iterate) for iterate in ours.iterates()]
    starts = [noise, *(iterate - x for iterate in iterates[1:])]
    part = lambda a, b: float(np.mean(np.abs(a - b) > 1e-6))
    one_step = [
        part(peer.attack(start, steps=1), iterate)
        for start, iterate in zip(starts, iterates[1:], strict=False)
    ]
    found.append(('share of pixels that part in one step of the attack', max(one_step), 1e-3))
    # Seven steps of signs amplify rounding, the more the deeper the network. What a single step may
    # do differently is bounded above.
    found.append(
        (
            'share of pixels that part in the whole attack',
            part(peer.attack(noise), iterates[-1]),
            0.15,
        )
    )
    return found + _compare_updates(ours, peer, iterates[-1], sizes)


def _compare_updates(ours, peer, x_adv, sizes):
    momentum = ours.config.batch_norm.momentum
    state, metrics = ours.update(x_adv)
    peer_metrics = peer.update(x_adv)
    found = [
        (name.replace('_', ' '), abs(float(metrics[name]) - peer_metrics[name]), 1e-4)
        for name in ('clean_loss', 'adversarial_loss')
    ]
    weights = peer_pytorch.state_dict(state.params)
    sums = peer_pytorch.state_dict(optax.tree.get(state.opt_state, 'trace'))
    gradient_error = weight_error = 0.0
    for name, parameter in peer.ensemble.named_parameters():
        buffer = peer.optimizer.state[parameter]['momentum_buffer']
        error = torch.linalg.norm(torch.tensor(sums[name]) - buffer.cpu())
        error = float(error / torch.linalg.norm(parameter.grad.cpu()))
        gradient_error = max(gradient_error, error)
        weight_error = max(weight_error, _largest(weights[name], parameter.detach().cpu()))
    # Single ReLUs at zero, in a sum of 64 images that mostly cancel: PyTorch's float32 and float64
    # differ as much, and ensadv from float64 less.
    found.append(('gradients + decay + momentum, relative norm', gradient_error, 1e-2))
    # The learning rate, 0.1, times what the gradients may differ by, which grows with the depth.
    found.append(('weights', weight_error, 1e-4))
    # Torch's running variance takes in unbiased variances, n / (n - 1) times those that Flax's
    # takes in; both passes of a step have the same n.
    before = peer_pytorch.state_dict(ours.start.batch_stats)
    errors = {'mean': 0.0, 'var': 0.0}
    for name, array in peer_pytorch.state_dict(state.batch_stats).items():
        module, _, kind = name.rpartition('.running_')
        if kind == 'var':
            kept = momentum**2 * before[name]
            array = kept + (array - kept) * sizes[module] / (sizes[module] - 1)
        reference = peer.ensemble.get_buffer(name).cpu().numpy()
        error = _largest(array, reference) / np.abs(reference).max()
        errors[kind] = max(errors[kind], float(error))
    found.append(('running means, relative', errors['mean'], 1e-4))
    found.append(("running variances in torch's form, relative", errors['var'], 1e-4))
    return found


def _largest(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def is_out_of_memory(error):
    """Whether an exception, of JAX or PyTorch, says that the device's memory is too small."""
    said = str(error).lower().replace('_', ' ')
    return any(words in said for words in ('resource exhausted', 'out of memory'))


def measure(ours, peers, repeats, num_steps):
    """Times steps in turns; first compares a step, made with the same noise, and does not time it.

    A peer that cannot be compiled (without a C++ compiler, say) is left out, with a line on stderr.

    Args:
      ours, peers: our side, and {name: Peer}.
      repeats: turns.
      num_steps: steps of a turn: one call of ours, as training makes it; as many calls of a peer's.

    Returns:
      {name: seconds per step of each turn}, and what `compare` returns.
    """
    sides = {OURS: ours} | peers
    metrics = ours.step()
    found = []
    for name, peer in peers.items():
        try:
            peer_metrics = peer.step(start=ours.noise())
        except Exception as error:  # compilers fail in every way
            if not peer.compiled or is_out_of_memory(error):
                raise
            reason = (str(error).splitlines() or [''])[0]
            print(f'{name}: left out: {type(error).__name__}: {reason}', file=sys.stderr)
            del sides[name]
            continue
        allowed_losses = ALLOWED_LOSSES[ours.config.model.dtype]
        for metric, allowed in zip(('clean_loss', 'adversarial_loss'), allowed_losses, strict=True):
            error = abs(metrics[metric] - peer_metrics[metric])
            words = metric.replace('_', ' ')
            found.append((f'{words} of the timed step, {name}', error, allowed))
    require(found)
    # Once more without a clock: a compiled peer may compile again for its second step.
    for side in sides.values():
        side.step()
    seconds = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            start = time.perf_counter()
            metrics = side.step(num_steps)
            seconds[name].append((time.perf_counter() - start) / num_steps)
            if not all(map(math.isfinite, metrics.values())):
                sys.exit(f'{name}: the loss is no longer finite, so timings would mean nothing')
    return seconds, found


def require(found):
    """Ends the program with one line unless every difference is allowed."""
    wrong = [
        f'{what}: {value:.2g}, allowed {allowed:.2g}'
        for what, value, allowed in found
        if not value <= allowed
    ]
    if wrong:
        sys.exit(f'ensadv and PyTorch do not compute the same: {"; ".join(wrong)}')


def step_config(depth, width, members, batch, attack_steps, changes=None):
    """Returns the config of a step: float32 without crops and flips; raises ConfigError.

    `changes` sets further fields, as in {'model.dtype': 'bfloat16'}.
    """
    config = default.get_config()
    config.update_from_flattened_dict(
        {
            'data.pad': 0,
            'data.flip': False,
            'model.dtype': 'float32',
            'model.depth': depth,
            'model.width': width,
            'ensemble.size': members,
            'train.batch_size': batch,
            'attack.steps': attack_steps,
        }
        | (changes or {})
    )
    config = config.copy_and_resolve_references()
    config_checks.validate(config)
    return config
