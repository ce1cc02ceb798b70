"""Snapshots under attack: the job, its results, the transfer set and the decision planes."""

__all__ = [
    'any_model',
    'attack_settings',
    'audit',
    'blackbox',
    'decision_planes',
    'evaluate',
    'evaluator',
    'finished_runs',
    'members',
]
