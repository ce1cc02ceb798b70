"""The PyTorch peer: the same ensemble, attack and training step, written as PyTorch users would.

It exists to be measured against, by the other programs here, and is imported by nothing else. The
ensemble is that of the model.py that --mode=export writes. The rest does the same work as ours,
step for step: IFGSM on the ensemble's loss with running averages, then the mean of clean and
adversarial loss with batch statistics, and momentum. `load` gives it our weights.
"""

import torch
import torch.nn.functional as F  # noqa: N812, as every PyTorch program calls it
from torch import nn

from ensadv.exchange import model, naming


class Ensemble(model.Ensemble):
    """k Wide ResNets: float32 pixels [N, C, H, W] in [0, 1] -> log-probabilities [N, classes].

    `combine`: 'probs' or 'logits', what is averaged over the members.
    """

    def __init__(self, depth, width, k, num_classes, mean, std, combine='probs'):
        super().__init__('wide_resnet', depth, width, len(mean), num_classes, k, combine)
        for buffer, values in ((self.mean, mean), (self.std, std)):
            buffer.copy_(torch.as_tensor(values, dtype=torch.float32)[:, None, None])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        return F.log_softmax(super().forward(x), 1)


def state_dict(tree):
    """Renames our members' variables for the `state_dict` of an `Ensemble`.

    Args:
      tree: params, batch_stats or what has their form, nested dicts with leaves [k, ...].

    Returns:
      {'members.0.conv1.weight': array, ...}, kernels OIHW.
    """
    return naming.to_pytorch({'tree': tree})


def load(ensemble, params, batch_stats):
    """Gives an `Ensemble` our weights and running averages, in place."""
    weights = state_dict(params) | state_dict(batch_stats)
    weights = {name: torch.tensor(array) for name, array in weights.items()}
    ensemble.load_state_dict({**ensemble.state_dict(), **weights})


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
