"""The PyTorch peer: the same ensemble, attack and training step, written as PyTorch users would.

It exists to be measured against, by the other programs here, and is imported by nothing else. It
does the same work, step for step: Wide ResNets (Zagoruyko & Komodakis), the mean of the
members' softmax, IFGSM on the ensemble's loss with running averages, then the mean of clean and
adversarial loss with batch statistics, and momentum. `load` gives it our weights.
"""

import math
import re

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812, as every PyTorch program calls it
from torch import nn


class Block(nn.Module):
    """A pre-activation residual block, [N, inputs, H, W] -> [N, outputs, H/stride, W/stride]."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        activated = F.relu(self.bn1(x))
        h = self.conv1(activated)
        h = self.conv2(F.relu(self.bn2(h)))
        return h + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """WRN-depth-width: float32 pixels [N, 3, H, W] in [0, 1] -> logits [N, num_classes]."""

    def __init__(self, depth, width, num_classes, mean, std):
        super().__init__()
        for name, value in (('mean', mean), ('std', std)):
            value = torch.as_tensor(value, dtype=torch.float32).reshape(1, -1, 1, 1)
            self.register_buffer(name, value, persistent=False)
        self.conv0 = nn.Conv2d(self.mean.shape[1], 16, 3, 1, 1, bias=False)
        layers, inputs = [], 16
        for group, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            for i in range((depth - 4) // 6):
                layers.append(Block(inputs, outputs, 2 if group and i == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(inputs)
        self.linear = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        x = self.conv0((x - self.mean) / self.std)
        x = F.relu(self.bn(self.blocks(x)))
        return self.linear(x.mean((2, 3)))


class Ensemble(nn.Module):
    """k Wide ResNets: float32 pixels [N, 3, H, W] in [0, 1] -> log-probabilities [N, classes].

    `combine`: 'probs' or 'logits', what is averaged over the members.
    """

    def __init__(self, depth, width, k, num_classes, mean, std, combine='probs'):
        super().__init__()
        self.combine = combine
        self.members = nn.ModuleList(
            WideResNet(depth, width, num_classes, mean, std) for _ in range(k)
        )
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        if self.combine == 'logits':
            return F.log_softmax(torch.stack([member(x) for member in self.members]).mean(0), 1)
        log_probs = torch.stack([F.log_softmax(member(x), 1) for member in self.members])
        return torch.logsumexp(log_probs, 0) - math.log(len(self.members))


def state_dict(tree, depth):
    """Renames our members' variables for the `state_dict` of an `Ensemble`.

    Args:
      tree: params or batch_stats, nested dicts with leaves [k, ...], kernels HWIO.
      depth: of the Wide ResNet.

    Returns:
      {'members.0.conv0.weight': array, ...}, kernels OIHW.
    """
    leaves = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias'}
    leaves |= {'mean': 'running_mean', 'var': 'running_var'}

    def renamed(module):
        if not (match := re.fullmatch(r'group_(\d+)_block_(\d+)', module)):
            return module.replace('norm', 'bn').replace('_', '')
        group, block = map(int, match.groups())
        return f'blocks.{(group - 1) * ((depth - 4) // 6) + block - 1}'

    result = {}

    def visit(tree, modules):
        for name, value in tree.items():
            if hasattr(value, 'items'):
                visit(value, (*modules, renamed(name)))
                continue
            array = np.array(value)
            if name == 'kernel':
                array = np.moveaxis(array, (-1, -2), (1, 2))
            path = '.'.join((*modules, leaves[name]))
            result.update({f'members.{i}.{path}': member for i, member in enumerate(array)})

    visit(tree, ())
    return result


def load(ensemble, params, batch_stats):
    """Gives an `Ensemble` our weights and running averages, in place."""
    depth = 2 * len(ensemble.members[0].blocks) + 4
    weights = state_dict(params, depth) | state_dict(batch_stats, depth)
    weights = {name: torch.tensor(array) for name, array in weights.items()}
    counters = {
        name: tensor
        for name, tensor in ensemble.state_dict().items()
        if name.endswith('num_batches_tracked')
    }
    ensemble.load_state_dict(weights | counters)


def images(array):
    """NumPy NHWC float32 -> a channels-last tensor [N, C, H, W] of the same memory layout."""
    return torch.tensor(array).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def attack(ensemble, x, y, *, start=None, steps=7, step_size=2 / 255, epsilon=8 / 255, sigma=None):
    """IFGSM on the ensemble's loss, with running averages; returns pixels shaped as x.

    `start` is the noise to begin from, drawn from N(0, sigma^2) where None (sigma: epsilon / 2).
    """
    training = ensemble.training
    # Without this a compiled backward pass would also make the weights' gradients, for nothing.
    ensemble.eval().requires_grad_(False)
    if start is None:
        start = torch.randn_like(x) * (epsilon / 2 if sigma is None else sigma)
    low, high = (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)
    adversarial = torch.clamp(x + start, low, high)
    for _ in range(steps):
        adversarial.requires_grad_()
        loss = F.nll_loss(ensemble(adversarial), y, reduction='sum')
        (gradient,) = torch.autograd.grad(loss, adversarial)
        with torch.no_grad():
            adversarial = torch.clamp(adversarial + step_size * gradient.sign(), low, high)
    ensemble.train(training).requires_grad_(True)
    return adversarial.detach()


def make_optimizer(ensemble, learning_rate=0.1, momentum=0.9, weight_decay=5e-4):
    """SGD as Wide ResNets use it: weight decay on every parameter, added to the gradient."""
    parameters = ensemble.parameters()
    return torch.optim.SGD(parameters, learning_rate, momentum, weight_decay=weight_decay)


def update(ensemble, optimizer, x, adversarial, y, *, model=None):
    """Descends the mean of clean and adversarial loss, in place; returns losses and accuracies.

    `model` is what is called for `ensemble`: the same, or `torch.compile(ensemble)`.
    """
    model = ensemble if model is None else model
    ensemble.train()
    optimizer.zero_grad(set_to_none=True)
    metrics, losses = {}, []
    for name, batch in (('clean', x), ('adversarial', adversarial)):
        log_probs = model(batch)
        losses.append(F.nll_loss(log_probs, y))
        metrics[f'{name}_loss'] = losses[-1].detach()
        metrics[f'{name}_accuracy'] = (log_probs.argmax(1) == y).float().mean()
    (sum(losses) / 2).backward()
    optimizer.step()
    return {name: value.item() for name, value in metrics.items()}


def train_step(ensemble, optimizer, x, y, *, model=None, **attack_settings):
    """One adversarial step, in place; returns what `update` returns."""
    adversarial = attack(ensemble if model is None else model, x, y, **attack_settings)
    return update(ensemble, optimizer, x, adversarial, y, model=model)
