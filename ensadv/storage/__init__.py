"""What a run writes, and how it is read."""

__all__ = [
    'audits',
    'checkpoints',
    'environments',
    'files',
    'leases',
    'ledgers',
    'member_files',
    'metrics',
    'plane_files',
    'records',
    'selection',
    'tensor_files',
    'workdir',
]
