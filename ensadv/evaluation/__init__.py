"""Snapshots under attack: the job, its results, the transfer set and the decision planes."""

__all__ = ['attack_settings', 'blackbox', 'decision_planes', 'evaluate', 'evaluator']
