"""An ensemble of image classifiers in PyTorch, with its weights in weights.safetensors beside it.

    import model
    ensemble = model.load()  # in evaluation mode, on the CPU
    logits = ensemble(images)  # float32 [B, C, H, W] in [0, 1] -> float32 [B, classes]

The standardisation of the images is inside, and so is what makes one prediction of the members'.
The log_softmax of the logits are the ensemble's log-probabilities.

    python model.py --onnx FILE    writes it as ONNX, for any number of images (needs onnxscript)

Written by ensadv; it needs PyTorch, and nothing else.
"""

import argparse
import json
import math
import pathlib
import struct

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

FOLDER = pathlib.Path(__file__).resolve().parent
ACTIVATIONS = {'relu': F.relu, 'silu': F.silu}
VGG_STAGES = {  # convolutions in each stage, by depth
    11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4),
}  # fmt: skip


class Block(nn.Module):
    """A pre-activation residual block, [B, inputs, H, W] -> [B, outputs, H', W'].

    `padding`: of the convolution with stride 2: 'symmetric', or 'same' as TensorFlow pads.
    """

    def __init__(self, inputs, outputs, stride, activation, padding, epsilon):
        super().__init__()
        self.activate = ACTIVATIONS[activation]
        self.pads_itself = padding == 'same' and stride == 2
        self.bn1 = nn.BatchNorm2d(inputs, epsilon)
        pad = 0 if self.pads_itself else 1
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, pad, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs, epsilon)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.convShortcut = None
        if stride > 1 or inputs != outputs:
            self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        y = self.activate(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(y)
        if self.pads_itself:
            height, width = (n % 2 for n in y.shape[2:])
            y = F.pad(y, (width, 1, height, 1))
        y = self.conv1(y)
        return shortcut + self.conv2(self.activate(self.bn2(y)))


class Group(nn.Module):
    """Blocks, the first of which has the stride; its weights are called layer.0, ..."""

    def __init__(self, blocks, inputs, outputs, stride, *settings):
        super().__init__()
        first = Block(inputs, outputs, stride, *settings)
        others = (Block(outputs, outputs, 1, *settings) for _ in range(blocks - 1))
        self.layer = nn.Sequential(first, *others)

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-depth-width: standardised images [B, channels, H, W] -> logits [B, classes]."""

    def __init__(self, depth, width, channels, classes, activation, padding, epsilon):
        super().__init__()
        self.activate = ACTIVATIONS[activation]
        settings = (depth - 4) // 6, (activation, padding, epsilon)
        group = lambda inputs, outputs, stride: Group(
            settings[0], inputs, outputs, stride, *settings[1]
        )
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.block1 = group(16, 16 * width, 1)
        self.block2 = group(16 * width, 32 * width, 2)
        self.block3 = group(32 * width, 64 * width, 2)
        self.bn1 = nn.BatchNorm2d(64 * width, epsilon)
        self.fc = nn.Linear(64 * width, classes)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.activate(self.bn1(x)).mean((2, 3)))


class VGG(nn.Module):
    """VGG-depth with batch norm: standardised images [B, channels, H, W] -> logits [B, classes]."""

    def __init__(self, depth, width, channels, classes, activation, padding, epsilon):
        super().__init__()
        self.activate = ACTIVATIONS[activation]
        self.stages = VGG_STAGES[depth]
        for stage, layers in enumerate(self.stages, start=1):
            outputs = 16 * 2 ** min(stage - 1, 3) * width
            for layer in range(1, layers + 1):
                convolution = nn.Conv2d(channels, outputs, 3, 1, 1, bias=False)
                self.add_module(f'conv_{stage}_{layer}', convolution)
                self.add_module(f'norm_{stage}_{layer}', nn.BatchNorm2d(outputs, epsilon))
                channels = outputs
        self.fc = nn.Linear(channels, classes)

    def forward(self, x):
        for stage, layers in enumerate(self.stages, start=1):
            for layer in range(1, layers + 1):
                x = getattr(self, f'conv_{stage}_{layer}')(x)
                x = self.activate(getattr(self, f'norm_{stage}_{layer}')(x))
            if min(x.shape[2:]) >= 2:  # small images run out of pixels
                x = F.max_pool2d(x, 2)
        return self.fc(x.mean((2, 3)))


class Gate(nn.Module):
    """Standardised images [B, channels, H, W] -> how much a member counts, [B, 1]."""

    def __init__(self, channels, width):
        super().__init__()
        self.conv_1 = nn.Conv2d(channels, width, 3, 2, 1)
        self.conv_2 = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.linear = nn.Linear(2 * width, 1)

    def forward(self, x):
        x = F.relu(self.conv_2(F.relu(self.conv_1(x))))
        return self.linear(x.mean((2, 3)))


class Ensemble(nn.Module):
    """Images float32 [B, channels, H, W] in [0, 1] -> the ensemble's logits [B, classes].

    `combine` says how the members' logits become one: 'probs', the mean of their probabilities, of
    which these are the logarithms; 'logits', the mean of their logits; 'gating', a mean of their
    probabilities with weights that depend on the image.
    """

    def __init__(
        self, network, depth, width, channels, classes, members, combine='probs',
        activation='relu', padding='symmetric', epsilon=1e-5, gate_width=16,
    ):  # fmt: skip
        super().__init__()
        self.combine = combine
        self.register_buffer('mean', torch.zeros(channels, 1, 1))
        self.register_buffer('std', torch.ones(channels, 1, 1))
        make = {'wide_resnet': WideResNet, 'vgg': VGG}[network]
        self.members = nn.ModuleList(
            make(depth, width, channels, classes, activation, padding, epsilon)
            for _ in range(members)
        )
        gates = members if combine == 'gating' else 0
        self.gates = nn.ModuleList(Gate(channels, gate_width) for _ in range(gates))

    def forward(self, x):
        x = (x - self.mean) / self.std
        logits = torch.stack([member(x) for member in self.members])
        if self.combine == 'logits' or len(self.members) == 1:
            return logits.mean(0)
        log_probs = F.log_softmax(logits, 2)
        if self.combine == 'gating':
            scores = torch.stack([gate(x) for gate in self.gates])
            return torch.logsumexp(log_probs + F.log_softmax(scores, 0), 0)
        return torch.logsumexp(log_probs, 0) - math.log(len(self.members))


def read_safetensors(path):
    """Returns the tensors of a file, float32 by name, and its metadata, texts by name."""
    content = pathlib.Path(path).read_bytes()
    (length,) = struct.unpack('<Q', content[:8])
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop('__metadata__', {})
    tensors = {}
    for name, entry in header.items():
        assert entry['dtype'] == 'F32', f'{name}: expected float32, found {entry["dtype"]}'
        first, end = (8 + length + offset for offset in entry['data_offsets'])
        values = torch.frombuffer(bytearray(content[first:end]), dtype=torch.float32)
        tensors[name] = values.reshape(entry['shape'])
    return tensors, metadata


def load(path=FOLDER / 'weights.safetensors'):
    """Returns the ensemble of a file of weights, on the CPU and in evaluation mode."""
    tensors, metadata = read_safetensors(path)
    ensemble = Ensemble(**json.loads(metadata['ensadv'])['network'])
    ensemble.load_state_dict(tensors)
    return ensemble.eval()


def write_onnx(file):
    """Writes the ensemble as ONNX: 'images' [B, C, H, W] -> 'logits' [B, classes], for any B."""
    tensors, _ = read_safetensors(FOLDER / 'reference.safetensors')
    torch.onnx.export(
        load(), (tensors['images'][:2],), file, dynamo=True, external_data=False,
        input_names=['images'], output_names=['logits'],
        dynamic_shapes=({0: torch.export.Dim('batch')},),
    )  # fmt: skip


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Writes the ensemble as ONNX.')
    parser.add_argument('--onnx', metavar='FILE', required=True, help='file that is written')
    write_onnx(parser.parse_args().onnx)
