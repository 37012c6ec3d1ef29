"""A task that outlives every signal it can and appends each to a file: ``witness.py FILE NAME``.

It has a child, NAME.child, in a session of its own.
"""

import os
import signal
import subprocess
import sys
import time

file, name = sys.argv[1:]


def note(event: str) -> None:
    """One whole line, whoever else writes."""
    with open(file, "a") as lines:
        lines.write(f"{name} {event} {os.environ.get('SLURM_RESTART_COUNT', 0)}\n")


for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda received, _: note(signal.Signals(received).name))
if not name.endswith(".child"):
    command = [sys.executable, __file__, file, f"{name}.child"]
    subprocess.Popen(command, start_new_session=True)
note("ready")
while True:
    time.sleep(1)
