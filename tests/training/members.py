"""Processes of `tests.training.member` in the background."""

import json
import os
import socket
import subprocess
import sys

from tests.conftest import ROOT


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(workdir, *flags, devices=2, settings=None):
    """A process of `member` in the background, its two streams as one."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
        "TQDM_DISABLE": "1",
    }
    command = [sys.executable, "-m", "tests.training.member", f"--workdir={workdir}", *flags]
    command.append(f"--settings={json.dumps(settings or {})}")
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def ended(*processes, timeout=240):
    """[(exit code, output)] of processes."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, output) for p, output in zip(processes, outputs, strict=True)]


def pair(workdir, on=("", ""), devices=(2, 2), settings=({}, {}), workdirs=None):
    port = free_port()
    return [
        start(
            workdirs[i] if workdirs else workdir,
            f"--coordinator=127.0.0.1:{port}",
            f"--process={i}",
            "--processes=2",
            f"--on={on[i]}",
            devices=devices[i],
            settings=settings[i],
        )
        for i in (0, 1)
    ]
