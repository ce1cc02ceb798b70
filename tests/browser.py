"""Opens a page in headless Chromium, through its debugging protocol, and tells what is wrong."""

import contextlib
import json
import os
import pathlib
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome')
PHONE = {'width': 360, 'height': 740, 'deviceScaleFactor': 1, 'mobile': True}
TIME_LIMIT = 60  # seconds
_OPTIONS = (
    '--headless=new',
    '--no-sandbox',
    '--disable-gpu',
    '--disable-dev-shm-usage',
    '--disable-background-networking',
    '--disable-component-update',
    '--no-first-run',
    '--host-resolver-rules=MAP * ~NOTFOUND',  # nothing that a page asks for is fetched
)


def find() -> str | None:
    """Returns the path of a Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def problems(path: pathlib.Path) -> list[str]:
    """Opens a page from its file, as on a phone, and returns what is wrong with it, a line each.

    That is: warnings and errors on the console, exceptions, requests for anything but the page
    itself and data: URIs, and a page wider than the screen.
    """
    with _chromium() as browser:
        target = browser.call('Target.createTarget', url='about:blank')['targetId']
        attached = browser.call('Target.attachToTarget', targetId=target, flatten=True)
        browser.session = attached['sessionId']
        for domain in ('Runtime', 'Log', 'Network', 'Page'):
            browser.call(f'{domain}.enable')
        browser.call('Page.setLifecycleEventsEnabled', enabled=True)
        browser.call('Emulation.setDeviceMetricsOverride', **PHONE)
        url = path.absolute().as_uri()
        loader = browser.call('Page.navigate', url=url)['loaderId']
        # Half a second after the last request.
        browser.wait('Page.lifecycleEvent', loaderId=loader, name='networkIdle')
        width = browser.call('Runtime.evaluate', expression='document.documentElement.scrollWidth')
    found = [line for event in browser.events if (line := _problem(event, url))]
    if (wide := width['result']['value']) > PHONE['width']:
        found.append(f'wide: {wide} pixels on a screen of {PHONE["width"]}')
    return found


def _problem(event: Mapping[str, Any], url: str) -> str:
    """Returns what an event says is wrong, or ''."""
    params = event['params']
    match event['method']:
        case 'Runtime.consoleAPICalled' if params['type'] in ('error', 'warning', 'assert'):
            texts = [str(arg.get('value', arg.get('description'))) for arg in params['args']]
            return f'console: {params["type"]}: {" ".join(texts)}'
        case 'Log.entryAdded' if params['entry']['level'] in ('error', 'warning'):
            return f'console: {params["entry"]["level"]}: {params["entry"]["text"]}'
        case 'Runtime.exceptionThrown':
            details = params['exceptionDetails']
            description = details.get('exception', {}).get('description', '')
            return f'exception: {details["text"]} {description}'
        case 'Network.requestWillBeSent':
            asked = params['request']['url']
            return '' if asked == url or asked.startswith('data:') else f'request: {asked}'
    return ''


class _Browser:
    """A connection to Chromium: JSON messages that end in a zero byte, over two pipes."""

    def __init__(self, to_browser: int, from_browser: int):
        self.events = []
        self.session = None
        self._to, self._from = to_browser, from_browser
        self._calls = 0
        self._rest = b''
        self._deadline = time.monotonic() + TIME_LIMIT

    def call(self, method: str, **params) -> dict[str, Any]:
        """Calls a method of the protocol, and returns its result."""
        self._calls += 1
        message = {'id': self._calls, 'method': method, 'params': params}
        if self.session:
            message['sessionId'] = self.session
        os.write(self._to, json.dumps(message).encode() + b'\0')
        while (answer := self._read()).get('id') != self._calls:
            pass
        if 'error' in answer:
            raise RuntimeError(f'{method}: {answer["error"]}')
        return answer['result']

    def wait(self, method: str, **params) -> None:
        """Waits for an event, which may have come already."""

        def is_it(event: Mapping[str, Any]) -> bool:
            return event.get('method') == method and params.items() <= event['params'].items()

        if not any(map(is_it, self.events)):
            while not is_it(self._read()):
                pass

    def _read(self) -> dict[str, Any]:
        """Returns the next message; events are kept."""
        while b'\0' not in self._rest:
            left = max(0, self._deadline - time.monotonic())
            if not select.select([self._from], [], [], left)[0]:
                raise TimeoutError(f'Chromium said nothing more within {TIME_LIMIT} s')
            if not (new := os.read(self._from, 1 << 16)):
                raise RuntimeError('Chromium ended')
            self._rest += new
        message, self._rest = self._rest.split(b'\0', 1)
        message = json.loads(message)
        if 'method' in message:
            self.events.append(message)
        return message


@contextlib.contextmanager
def _chromium() -> Iterator[_Browser]:
    """Starts Chromium, and ends it and all that it started."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    # Chromium reads from descriptor 3 and writes to 4.
    script = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options = [*_OPTIONS, '--remote-debugging-pipe', f'--user-data-dir={folder}']
        process = subprocess.Popen(
            ['bash', '-c', script, find(), *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs_in, theirs_out),
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield _Browser(ours_out, ours_in)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(ours_out)
            os.close(ours_in)
