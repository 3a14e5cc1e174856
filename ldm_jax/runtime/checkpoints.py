"""Checkpoints of a run: orbax behind four functions' worth of interface.

A step is written to a temporary directory and renamed when whole, so that a crash, a full disk or
a second Ctrl-C leaves the previous checkpoint as it was.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints under `directory`; the newest `keep` stay."""

    def __init__(self, directory: Path, keep: int = 2):
        self.directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_names=("state", "about")
        )

    def latest(self) -> int | None:
        """The newest whole checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, about: dict[str, Any]) -> None:
        """Writes a pytree of arrays and a JSON-able description beside it.

        Raises:
          OSError: the disk is full or not writable; says where, and which checkpoint survives.
        """
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)
        )
        before = self.latest()
        try:
            self._manager.save(step, args=arguments)
            self._manager.wait_until_finished()
        except Exception as error:  # orbax and its storage layer raise many kinds
            survivor = "no earlier one exists" if before is None else f"step {before} is intact"
            raise OSError(
                f"cannot write the checkpoint of step {step} under {self.directory} ({survivor}): "
                f"{error}"
            ) from error

    def restore(self, step: int, abstract: Any) -> Any:
        """The state of a step. `abstract` gives shapes, types and where each array shall lie."""
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._manager.restore(step, args=arguments).state

    def about(self, step: int) -> dict[str, Any]:
        """The description saved beside a step."""
        arguments = ocp.args.Composite(about=ocp.args.JsonRestore())
        return self._manager.restore(step, args=arguments).about

    def close(self) -> None:
        self._manager.close()


def abstract_like(state: Any, shardings: Any) -> Any:
    """Shapes and types of `state` with shardings, as `restore` wants them."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        state,
        shardings,
    )
