"""What the paper reports: its systems, in its order, and the numbers of its Table 1.

"Strength in Numbers: Trading-off Robustness and Computation via Adversarially-Trained Ensembles",
Table 1: accuracies on CIFAR-10's test set, epsilon 8/255, WRN-28-10, three seeds, by the attacks'
last iterates. Separate2Adv is in Table 1c alone.
"""

DATASET, EPSILON, STEPS = 'cifar10', 8 / 255, 500_000
SYSTEMS = (
    'Baseline',
    'Ensemble2',
    'Ensemble4',
    'SingleAdv',
    'DoubleAdv',
    'Ensemble2Adv',
    'Ensemble4Adv',
    'Separate2Adv',
)

_COLUMNS = ('clean', 'ifgsm5', 'pgd5', 'pgd20', 'blackbox')


def _rows(*rows: tuple[float, ...]) -> dict[str, dict[str, float]]:
    return {
        system: dict(zip(_COLUMNS, row, strict=True))
        for system, row in zip(SYSTEMS[:7], rows, strict=True)
    }


# The mean of the last 10 evaluations.
TABLE_1A = _rows(
    (0.94, 0.34, 0.15, 0.01, 0.27),
    (0.94, 0.59, 0.44, 0.30, 0.22),
    (0.91, 0.50, 0.40, 0.34, 0.26),
    (0.82, 0.55, 0.44, 0.43, 0.80),
    (0.83, 0.57, 0.46, 0.44, 0.82),
    (0.85, 0.62, 0.55, 0.52, 0.83),
    (0.87, 0.66, 0.58, 0.53, 0.85),
)
# At the step with the best IFGSM5 accuracy.
TABLE_1B = _rows(
    (0.95, 0.57, 0.29, 0.09, 0.26),
    (0.95, 0.65, 0.52, 0.38, 0.22),
    (0.93, 0.60, 0.48, 0.43, 0.24),
    (0.84, 0.57, 0.46, 0.45, 0.81),
    (0.85, 0.60, 0.48, 0.47, 0.84),
    (0.87, 0.64, 0.56, 0.52, 0.85),
    (0.88, 0.67, 0.58, 0.52, 0.86),
)
# After 500 steps, of the snapshots of Table 1b.
TABLE_1C = {
    'Baseline': {'ifgsm500': 0.16, 'pgd500': 0.04},
    'SingleAdv': {'ifgsm500': 0.46, 'pgd500': 0.44},
    'DoubleAdv': {'ifgsm500': 0.47, 'pgd500': 0.47},
    'Ensemble2': {'ifgsm500': 0.13, 'pgd500': 0.02},
    'Ensemble2Adv': {'ifgsm500': 0.55, 'pgd500': 0.52},
    'Separate2Adv': {'ifgsm500': 0.49, 'pgd500': 0.47},
}
