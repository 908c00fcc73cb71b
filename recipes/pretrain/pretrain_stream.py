"""Text streamed from the hub as sequences of tokens without padding, with positions to go on from after any step."""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import torch
from pretrain_data import Encoder, as_item, text_of
from torch.utils.data import IterableDataset

CHUNK = 64  # documents tokenized together, while training waits for them


class HubStream:
    """The texts of one split on the hub, for the process `rank` of `world`; `state()` may be restored elsewhere."""

    def __init__(self, name: str, config: str | None, split: str, column: str, rank: int = 0, world: int = 1) -> None:
        import datasets
        from datasets.distributed import split_dataset_by_node

        self.where, self.column = f"{name}, {split}", column
        self.rows = datasets.load_dataset(name, config, split=split, streaming=True)
        if world > 1:
            self.rows = split_dataset_by_node(self.rows, rank=rank, world_size=world)

    def state(self) -> dict | None:
        return self.rows.state_dict()

    def restore(self, state: dict) -> None:
        self.rows.load_state_dict(state)

    def __iter__(self) -> Iterator[str]:
        for row in self.rows:
            yield text_of(row, self.column, self.where)


class PackedStream(IterableDataset):
    """Sequences from a stream that starts again at its end, and where in it they end, to go on from.

    `opened` gives a stream from its beginning: iterable, with `state()` and `restore(state)`. `every` is the number of
    sequences after which a position may be asked for: those of one optimizer step of this process.
    """

    def __init__(
        self, opened: Callable, encode: Encoder, sequence_length: int, every: int, keep: Callable[[str], bool]
    ) -> None:
        self.opened, self.encode, self.length, self.every, self.keep = opened, encode, sequence_length, every, keep
        self.start: tuple[int, dict | None] = (0, None)
        self._positions: deque[tuple[int, dict | None]] = deque()

    def go_on(self, sequences: int, position: dict) -> None:
        """Start behind that many sequences, at a position that `position` gave for them."""
        self.start = (sequences, position)

    def position(self, sequences: int) -> dict | None:
        """Where the stream stands after so many sequences, whatever was read ahead; forgets earlier positions."""
        while len(self._positions) > 1 and self._positions[1][0] <= sequences:
            self._positions.popleft()
        if not self._positions or self._positions[0][0] != sequences:
            raise RuntimeError(f"no position after {sequences} sequences; expected a multiple of {self.every}")
        return self._positions[0][1]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        given, position = self.start
        self._positions = deque([self.start])
        source, at = self.opened(), 0  # `at`: index of the next token, counted from the start of the first chunk
        if position:
            at = position["offset"]
            if position["state"] is not None:
                source.restore(position["state"])
        chunks: deque[tuple[int, dict | None]] = deque()
        buffer, end = np.zeros(0, self.encode.dtype), 0
        for state, tokens in self._chunks(source):
            chunks.append((end, state))
            buffer = np.concatenate([buffer, tokens[max(0, at - end) :]])  # on going on, without what was used
            end += len(tokens)
            while len(buffer) >= self.length:
                piece, buffer = buffer[: self.length], buffer[self.length :]
                at, given = at + self.length, given + 1
                if given % self.every == 0:
                    while len(chunks) > 1 and chunks[1][0] <= at:
                        chunks.popleft()
                    self._positions.append((given, {"state": chunks[0][1], "offset": at - chunks[0][0]}))
                yield as_item(piece)

    def _chunks(self, source) -> Iterator[tuple[dict | None, np.ndarray]]:
        """Tokens of a few documents, and the stream's state before them."""
        passes = 0
        while True:
            texts_of_pass, iterator = 0, iter(source)
            while True:
                state = source.state()
                texts = list(islice(iterator, CHUNK))
                if not texts:
                    break
                kept = [text for text in texts if text.strip() and self.keep(text)]
                texts_of_pass += len(kept)
                yield state, self.encode(kept)
            if passes and not texts_of_pass:
                raise SystemExit("The stream has no text to train on; expected another data set or --text_column.")
            passes += 1
            source = self.opened()
