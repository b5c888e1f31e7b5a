"""What a module saw of a packed sequence, laid out as of its examples padded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thrifty.data.packed_attention import documents


@dataclass(frozen=True)
class PackLayout:
    """Where the tokens of one packed sequence are among its examples as padded rows."""

    rows: Any
    """[sequence]: of which example each token is."""
    columns: Any
    """[sequence]: its place in that."""
    num_examples: int
    longest: int

    @classmethod
    def of(cls, positions: Any) -> PackLayout:
        """Of positions ``[1, sequence]``, 0 where an example begins. Raises ValueError for what is
        no pack."""
        columns = positions.reshape(-1)
        grows = columns.diff(prepend=columns.new_tensor([-1]))
        if len(positions) != 1 or not bool(((grows == 1) | (columns == 0)).all()):
            raise ValueError(
                f"positions {list(positions.shape)} are not those of one packed sequence\n"
                "hint: [1, sequence], counting up from 0 anew in every example"
            )
        rows = documents(positions)[0]
        return cls(rows, columns, int(rows[-1]) + 1, int(columns.max()) + 1)

    def apart(self, values: Any) -> Any | None:
        """``[1, sequence, ...]``, or its tokens in a row, or along another axis (of heads that come
        first) -> ``[examples, longest, ...]``, padded with zeros; None where no one axis is that
        of the tokens."""
        size = len(self.rows)
        if len(values) == 1:
            axes = [
                axis for axis in range(1, max(values.dim() - 1, 2)) if values.shape[axis] == size
            ]
            if len(axes) != 1:
                return None
            values = values.movedim(axes[0], 1)[0]
        elif len(values) != size or values.dim() > 2:
            return None
        found = values.new_zeros(self.num_examples, self.longest, *values.shape[1:])
        found[self.rows, self.columns] = values
        return found

    def means(self, values: Any, keep: Any) -> Any:
        """[num_examples]: the mean of values of the tokens after the first ``[sequence - 1]`` over
        those to ``keep``; 0 where there are none."""
        zeros, rows = values.new_zeros(self.num_examples), self.rows[1:]
        count = zeros.index_add(0, rows, keep.to(values.dtype))
        return zeros.index_add(0, rows, values * keep) / count.clamp_min(1)
