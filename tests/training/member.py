"""One process of a run of `least_squares`: python -m tests.training.member CONFIG_JSON FLAGS.

Flags that start with --on. make this process misbehave before it reads the batch of that step:
--on=STEP:kill, :term, :stop or :fail.
"""

import json
import os
import signal

from absl import flags

from ldm_jax.runtime.console import leave, run
from ldm_jax.runtime.processes import join, part
from tests.training.least_squares import Task, a_config

WORKDIR = flags.DEFINE_string("workdir", "", "")
SETTINGS = flags.DEFINE_string("settings", "{}", "")
ON = flags.DEFINE_string("on", "", "")
COORDINATOR = flags.DEFINE_string("coordinator", "", "")
PROCESS = flags.DEFINE_integer("process", None, "")
PROCESSES = flags.DEFINE_integer("processes", None, "")
WAIT = flags.DEFINE_float("wait", 60, "")
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}


class Member(Task):
    def before(self, step):
        at, _, what = ON.value.partition(":")
        if at and step == int(at):
            if what == "fail":
                raise ValueError("a broken disk")
            os.kill(os.getpid(), SIGNALS[what])


def main():
    join(COORDINATOR.value, PROCESS.value, PROCESSES.value, WAIT.value)
    from ldm_jax.training import loop

    loop.make_task = lambda *_: Member()
    try:
        loop.train(a_config(**json.loads(SETTINGS.value)), WORKDIR.value)
    except loop.Interrupted:
        part()
        leave()
    part()


if __name__ == "__main__":
    run(main)
