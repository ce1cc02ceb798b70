"""What sessions and results were computed with, as they are stored, compared."""

from collections.abc import Mapping
from typing import Any

_XLA_FLAGS_WITHOUT_EFFECT = ('--xla_dump', '--xla_force_host_platform_device_count')


def switches(record: Mapping[str, Any]) -> dict[str, str]:
    """Returns what a session or a result was computed with, by name, XLA_FLAGS among it.

    XLA_FLAGS are in alphabetic order, without those that alter no number.

    Args:
      record: has what `recorded` gives; older versions of this program did not have 'switches'.
    """
    flags = sorted(
        flag
        for flag in record.get('xla_flags', '').split()
        if not flag.startswith(_XLA_FLAGS_WITHOUT_EFFECT)
    )
    xla = {'XLA_FLAGS': ' '.join(flags)} if flags else {}
    return dict(record.get('switches', {})) | xla


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns 'name: before -> now' for each thing in which two sessions' environments differ."""

    def flat(session):
        devices = {'devices': f'{session["devices"]["count"]} x {session["devices"]["kind"]}'}
        return devices | session['versions'] | switches(session)

    old, new = flat(before), flat(now)
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return [f'{name}: {old.get(name, "none")} -> {new.get(name, "none")}' for name in names]
