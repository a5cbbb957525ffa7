"""Runs a script that works through names, and starts it anew for the rest when it dies or hangs."""

import json
import os
import queue
import subprocess
import threading
import time


def supervise(make_command, names, *, limit, deadline, environment=None):
    """Yield the messages of a script, JSON objects one a line, with the name that each belongs to.

    Args:
        make_command: from the names that are left, the command that works through them. It says
            `{"begin": name}` and `{"end": name}`; a line that is no JSON object is passed on as a
            note.
        names: all of them.
        limit: seconds that one name may take.
        deadline: when all has to end, in seconds of `time.monotonic`.
        environment: of the script, beside that of this process.

    Yields:
        (name or `None`, message). Of a script that ends early, `{"failed": why}`.
    """
    left = list(names)
    while left and time.monotonic() < deadline:
        with _Script(make_command(left), environment or {}) as script:
            name, until = None, deadline
            while left:
                message = script.message(until)
                if message is None:
                    break
                name = message.get("begin", name)
                yield name, message
                if "begin" in message:
                    until = min(deadline, time.monotonic() + limit)
                if "end" in message:
                    left.remove(name)
                    name, until = None, deadline
        if left:
            over = "all is over" if until >= deadline else f"one, {limit:g} s, is over"
            late = time.monotonic() >= until
            yield name, {"failed": f"the time for {over}" if late else script.told}
        # Without a name that it ended at, it would end there again.
        left = [x for x in left if x != name] if name else []


class _Script:
    """A process and what it says; it ends with the context."""

    def __init__(self, command, environment):
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        self._lines, self._closed = queue.Queue(), False
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def message(self, until):
        """The next one; `None` at the end, or if there is none until then."""
        try:
            line = self._lines.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            return None
        self._closed = line is None
        return None if line is None else _message(line)

    @property
    def told(self):
        """How it ended."""
        return f"the process ended, code {self._process.returncode}"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if not self._closed:  # else it is about to end, with a code of its own
            self._process.kill()
        self._process.wait()
        self._reader.join()
        self._process.stdout.close()


def _message(line):
    try:
        message = json.loads(line)
    except ValueError:
        message = line.rstrip()
    return message if isinstance(message, dict) else {"note": str(message)}
