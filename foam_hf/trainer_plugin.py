"""Where pickles look for `optimizer_name`: every training_args.bin of version 0.2 and earlier names this path."""

from foam_hf.trainer.names import optimizer_name

__all__ = ["optimizer_name"]
