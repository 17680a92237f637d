"""Where the elements of every parameter lie: in the plain model, and in the fp32 shards of this process.

DeepSpeed cuts parameters in its own ways, whatever their shapes: ZeRO-1 and 2 lay a parameter group's parameters end to end
and cut the whole into equal lengths, ZeRO-3 cuts every parameter by itself. What a process is left with of a parameter is a
run of its elements in row-major order, a `Fragment`. Of a matrix, and every parameter is seen as one here, a run is made up
of at most three rectangles: the end of a row, whole rows, the beginning of a row. Rectangles can be put into a parameter, or
taken out of it, by processes that cut it in another way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from dalle_ds.parallel import Split


@dataclass(frozen=True)
class Rectangle:
    """Elements of a parameter that is seen as a matrix, its first axis by all others (`matrix_size`)."""

    row: int
    """First row, in the whole parameter."""
    column: int
    """First column."""
    rows: int
    """Number of rows."""
    columns: int
    """Number of columns."""
    start: int
    """Place of the first element in the fragment."""
    stride: int
    """From one row to the next in the fragment."""

    def of(self, run: Tensor) -> Tensor:
        """The rectangle of a fragment's elements, 1-D: a view (rows, columns)."""
        return run.as_strided((self.rows, self.columns), (self.stride, 1), run.storage_offset() + self.start)

    def in_matrix(self, whole: Tensor) -> Tensor:
        """The rectangle's place in the whole parameter's matrix: a view (rows, columns)."""
        return whole[self.row : self.row + self.rows, self.column : self.column + self.columns]


@dataclass(frozen=True)
class Fragment:
    """A run of a parameter's elements that this process keeps in one of its fp32 shards; padding is none of them."""

    name: str
    """The parameter's name in the plain model."""
    shape: tuple[int, ...]
    """Of the parameter, or of this process's piece of it where a tensor group divides it."""
    start: int
    """Place of the first element in that, flattened."""
    length: int
    """Number of elements, at least one."""
    shard: int
    """Number of the shard."""
    offset: int
    """Place of the first element in the shard, flattened."""
    split: Split | None = None
    """How the parameter is divided among the tensor group; None where it is not."""
    part: int = 0
    """Number of this process in its tensor group."""
    parts: int = 1
    """Processes in the tensor group."""

    @property
    def whole(self) -> tuple[int, ...]:
        """Shape of the parameter in the plain model."""
        shape = list(self.shape)
        if self.split is not None:
            shape[self.split.axis] *= self.parts
        return tuple(shape)

    def of(self, tensor: Tensor) -> Tensor:
        """This run of the shard, or of a tensor that is laid out as it: a view (length,)."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.length)

    def rectangles(self) -> list[Rectangle]:
        """What the run is made up of in the plain model's parameter."""
        height, width = matrix_size(self.shape)
        found: list[Rectangle] = []
        for row, column, rows, columns in _runs(self.start, self.length, width):
            start = row * width + column - self.start
            for global_row, skipped_rows, some_rows in self._placed(0, row, rows, height):
                for global_column, skipped_columns, some_columns in self._placed(1, column, columns, width):
                    begin = start + skipped_rows * width + skipped_columns
                    found.append(Rectangle(global_row, global_column, some_rows, some_columns, begin, width))
        return found

    def _placed(self, axis: int, first: int, count: int, size: int) -> Iterator[tuple[int, int, int]]:
        """An interval of a piece's matrix, as intervals of the whole one: (first, how many come before, how many).

        Args:
            size: of the piece's matrix along the axis.
        """
        if self.split is None or self.split.axis != axis:
            yield first, 0, count
            return
        block = size // self.split.parts  # what this process has of each part of the axis
        done = 0
        while done < count:
            number, inside = divmod(first + done, block)
            some = min(block - inside, count - done)
            yield (number * self.parts + self.part) * block + inside, done, some
            done += some


def matrix_size(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a parameter that is seen as a matrix: its first axis, and all others."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def _runs(start: int, length: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """A run of a matrix's elements as rectangles: (row, column, rows, columns)."""
    while length > 0:
        row, column = divmod(start, width)
        if column or length < width:
            rows, columns = 1, min(width - column, length)
        else:
            rows, columns = length // width, width
        yield row, column, rows, columns
        start += rows * columns
        length -= rows * columns
