"""Checkpoints: what several processes do in one directory."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ensadv import checkpoints


def test_looking_while_another_process_deletes(workdir):
    """Orbax lists the steps and then looks into each; one may be gone by then."""
    snapshots = checkpoints.open_snapshots(workdir)
    snapshots.save(0, {'params': np.ones(3)}, wait=True)
    deleted = threading.Event()

    def look():
        while not deleted.is_set():
            checkpoints.open_snapshots(workdir).steps()

    with ThreadPoolExecutor() as executor:
        lookers = [executor.submit(look) for _ in range(2)]
        for step in range(1, 30):
            snapshots.save(step, {'params': np.ones(3)}, wait=True)
            snapshots.delete(step - 1)
        deleted.set()
        for looker in lookers:
            looker.result()
