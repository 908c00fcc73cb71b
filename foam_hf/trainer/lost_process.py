"""What a run of several processes says when one of them has ended: the step, and the checkpoint to go on from."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from foam_hf.trainer.file_checks import Damaged, Unfinished
from foam_hf.trainer.manifest import check, checkpoints_in

logger = logging.getLogger("foam_hf")

# What gloo says, in RuntimeErrors of no class of their own.
_OF_GLOO = ("Connection closed by peer", "Connection reset by peer", "caused pair closure", "Timed out waiting")


@contextmanager
def explain_lost_process(trainer: Any) -> Iterator[None]:
    """Log one line if a collective fails because another process has ended or hangs; the error goes on as it is."""
    try:
        yield
    except Exception as error:
        if trainer.args.world_size > 1 and _is_lost(error):
            logger.error(_explanation(trainer))
        raise


def _is_lost(error: Exception) -> bool:
    from torch.distributed import DistError

    return isinstance(error, DistError) or any(words in str(error) for words in _OF_GLOO)


def _explanation(trainer: Any) -> str:
    args = trainer.args
    newest = newest_finished(Path(args.output_dir))
    going_on = (
        f"the newest checkpoint whose save finished is {newest}, from which resume_from_checkpoint=True goes on"
        if newest
        else f"no checkpoint in {args.output_dir} is complete, so a run must start anew"
    )
    return (
        f"process {args.process_index} of {args.world_size} stops after step {trainer.state.global_step}: "
        f"a collective failed, as another process has ended or hangs, whose own output says why; {going_on}"
    )


def newest_finished(output: Path) -> Path | None:
    """The newest checkpoint whose save finished. Large files are not read, as that takes long: resuming does it."""
    for folder in checkpoints_in(output):
        try:
            check(folder, lambda name: name == "trainer_state.json")
        except (Unfinished, Damaged):
            continue
        return folder
    return None
