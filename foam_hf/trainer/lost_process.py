"""What a run of several processes says when one of them has ended: the step, and the checkpoint to go on from."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from foam_hf.trainer.file_checks import Damaged, Unfinished
from foam_hf.trainer.manifest import check_sizes, checkpoints_in

logger = logging.getLogger("foam_hf")

# gloo raises RuntimeErrors of no class of their own, which begin with the file of its source.
_GLOO = ("Connection closed by peer", "Connection reset by peer", "caused pair closure", "Timed out waiting")
# NCCL's errors about this process itself: its arguments, its GPU, its memory.
_OF_THIS_PROCESS = ("ncclInvalidUsage", "ncclInvalidArgument", "ncclUnhandledCudaError")


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

    text = str(error)
    if isinstance(error, DistError):
        return not any(words in text for words in _OF_THIS_PROCESS)
    # Data that come over a network fail with the same words as gloo.
    return isinstance(error, RuntimeError) and "gloo/" in text and any(words in text for words in _GLOO)


def _explanation(trainer: Any) -> str:
    args, step = trainer.args, trainer.state.global_step
    return (
        f"process {args.process_index} of {args.world_size} stops after step {step}: a collective failed, as another "
        f"process has ended or hangs, whose own output says why; {_going_on(args, step)}"
    )


def _going_on(args: Any, step: int) -> str:
    """Where a run that has made `step` steps can go on, in words. An error here would hide that of the collective."""
    output = Path(args.output_dir)
    try:
        newest, is_first = newest_finished(output, step)
    except OSError as error:
        return f"{output} cannot be read: {error}"
    if newest is None:
        return f"no checkpoint of step {step} or before is complete in {output}, as this machine sees it"
    told = f"the newest checkpoint whose save finished is {newest}"
    if args.save_only_model:
        return f"{told}, which has weights alone, as save_only_model asks"
    return f"{told}, from which resume_from_checkpoint={True if is_first else str(newest)!r} goes on"


def newest_finished(output: Path, step: int) -> tuple[Path | None, bool]:
    """The newest checkpoint of `step` or before whose save finished, and whether resume_from_checkpoint=True takes it.

    True takes one of a later step, which is another run's, and refuses one that has lost a file. Contents are not
    compared, as that takes long: resuming does it.
    """
    is_first = True
    for folder in checkpoints_in(output):
        try:
            check_sizes(folder)
        except Unfinished:
            continue
        except (Damaged, OSError):
            is_first = False
            continue
        if int(folder.name.rpartition("-")[2]) <= step:
            return folder, is_first
        is_first = False
    return None, False
