"""Checks that model.py computes here what ensadv computed: python check.py [--onnx FILE].

reference.safetensors has test images and the log-probabilities that ensadv gave them, in float32.
With --onnx also a file that model.py wrote is checked, by onnxruntime.
"""

import argparse
import sys

import model
import torch

TOLERANCE = 1e-4  # of log-probabilities; of those beyond 1 in size relative to it


def difference(logits, reference):
    """Returns the largest difference between log-probabilities, in units of what is allowed."""
    found = torch.log_softmax(logits, 1)
    return ((found - reference).abs() / (TOLERANCE * reference.abs().clamp(min=1))).max().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--onnx', metavar='FILE', help='also check this file')
    onnx = parser.parse_args().onnx
    reference, _ = model.read_safetensors(model.FOLDER / 'reference.safetensors')
    images, log_probs = reference['images'], reference['log_probs']
    with torch.no_grad():
        found = {'model.py': difference(model.load()(images), log_probs)}
    if onnx:
        import onnxruntime

        session = onnxruntime.InferenceSession(onnx, providers=['CPUExecutionProvider'])
        (logits,) = session.run(None, {'images': images.numpy()})
        found[onnx] = difference(torch.tensor(logits), log_probs)
    for name, worst in found.items():
        passed = worst <= 1
        print(
            f'{name}: {"agrees" if passed else "DIFFERS"}: log-probabilities of {len(images)} '
            f'images differ by at most {worst * TOLERANCE:.2g} (allowed: {TOLERANCE:g})'
        )
    sys.exit(any(not worst <= 1 for worst in found.values()))


if __name__ == '__main__':
    main()
