"""What a run does beside training: the position of its data in every checkpoint, and the time of its steps."""

import json
import time
from pathlib import Path

from pretrain_arguments import PretrainArguments
from pretrain_stream import PackedStream
from pretrain_tokens import Data
from transformers import TrainerCallback, TrainingArguments

from foam_hf.recipe_kit import one_line, write_json


class Position(TrainerCallback):
    """Writes into every checkpoint where this process's data stand, and what they are; reads and checks it."""

    def __init__(self, recipe: PretrainArguments, args: TrainingArguments, data: Data) -> None:
        self.stream = data.train if isinstance(data.train, PackedStream) else None
        self.per_step = recipe.total_batch_size // args.world_size
        self.settings = {
            "data": data.made_from,
            "sequence_length": recipe.sequence_length,
            "total_batch_size": recipe.total_batch_size,
        }
        if self.stream is None:
            self.settings["seed"] = args.data_seed if args.data_seed is not None else args.seed
        else:
            self.settings["processes"] = args.world_size
        self.name = f"pretrain-{0 if self.stream is None else args.process_index}.json"

    def on_save(self, args, state, control, **kwargs) -> None:
        if self.stream is None and not state.is_world_process_zero:
            return
        position = None if self.stream is None else self.stream.position(state.global_step * self.per_step)
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        write_json(folder / self.name, {**self.settings, "position": position})

    def restore(self, checkpoint: Path) -> None:
        """Go on from what a checkpoint says; SystemExit where it is of other data or settings."""
        file = checkpoint / self.name
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            steps = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        except (OSError, ValueError, KeyError) as error:
            raise SystemExit(
                f"Cannot resume from {checkpoint}: {one_line(error)}; expected a whole checkpoint of this recipe, of "
                "as many processes where data are streamed."
            ) from None
        position = found.pop("position")
        changed = [key for key, value in self.settings.items() if found.get(key) != value]
        if changed:
            key = changed[0]
            raise SystemExit(f"{checkpoint} is of another {key}: {found.get(key)}; this run has {self.settings[key]}.")
        if self.stream is not None:
            self.stream.go_on(steps * self.per_step, position)


class Clock(TrainerCallback):
    """Seconds of the steps after the first two, evaluations and checkpoints left out."""

    def __init__(self) -> None:
        self.seconds, self.steps, self.seen = 0.0, 0, 0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seen += 1
        if self.seen > 2:  # they compile kernels and allocate
            self.seconds, self.steps = self.seconds + time.perf_counter() - self.began, self.steps + 1
