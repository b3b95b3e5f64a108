"""Tensors of a checkpoint: written whole, or by several processes in pieces of consecutive rows, and read on demand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

PIECES = "pieces"
"""Entry of a file's metadata: name -> [first row, shape of the whole tensor], of those tensors that are pieces."""


class Piece(NamedTuple):
    """Consecutive rows of a tensor."""

    rows: Tensor
    """[n, ...]"""
    first: int
    """Which row of the whole tensor is the first of them."""
    shape: tuple[int, ...]
    """The whole tensor's."""


def save_tensors(named: Mapping[str, Tensor | Piece], file: Path) -> None:
    """Write whole tensors and pieces into one safetensors file."""
    pieces = {name: [x.first, list(x.shape)] for name, x in named.items() if isinstance(x, Piece)}
    save_file(
        {name: (x.rows if isinstance(x, Piece) else x).detach().contiguous() for name, x in named.items()},
        file,
        metadata={PIECES: json.dumps(pieces)} if pieces else None,
    )


def bytes_of(named: Mapping[str, Tensor | Piece]) -> int:
    """Return an upper bound of the size of the file that :func:`save_tensors` writes."""
    tensors = [x.rows if isinstance(x, Piece) else x for x in named.values()]
    return sum(x.numel() * x.element_size() for x in tensors) + sum(len(name) + 192 for name in named) + 1024


class StoredTensors(Mapping[str, Tensor]):
    """A group's tensors by name, whichever of its files they are in; read from there when asked for, on the CPU."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Read the files' headers.

        Raises:
            ValueError: rows of a tensor are missing; names it.
        """
        self._files = [safe_open(file, "pt") for file in files]
        self._pieces: dict[str, list[tuple[int, int, Any]]] = {}
        """Name -> (first row, number of rows, file) in the order of rows; a whole tensor is one piece."""
        self.shapes: dict[str, torch.Size] = {}
        for file in self._files:
            facts: dict[str, Any] = json.loads((file.metadata() or {}).get(PIECES, "{}"))
            for name in list(file.keys()):
                here = file.get_slice(name).get_shape()
                first, shape = facts.get(name, (0, here))
                self.shapes[name] = torch.Size(shape)
                self._pieces.setdefault(name, []).append((first, here[0] if here else 1, file))
        for name, pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece[0])
            ends = [0, *(first + count for first, count, _ in pieces)]
            if [first for first, *_ in pieces] != ends[:-1] or ends[-1] != (self.shapes[name] or (1,))[0]:
                raise ValueError(f"rows of {name} are missing")

    def __getitem__(self, name: str) -> Tensor:
        """Read a whole tensor."""
        pieces = self._pieces[name]
        if len(pieces) == 1:
            return pieces[0][2].get_tensor(name)
        return torch.cat([file.get_tensor(name) for *_, file in pieces])

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Read some rows of a tensor, and no others: [count, ...]."""
        parts = [
            file.get_slice(name)[max(first - start, 0) : max(min(first + count, start + held) - start, 0)]
            for start, held, file in self._pieces[name]
            if start < first + count and first < start + held
        ]
        return torch.cat(parts) if parts else self[name][:0]

    def __iter__(self) -> Iterator[str]:
        """Iterate over names."""
        return iter(self._pieces)

    def __len__(self) -> int:
        """Count tensors."""
        return len(self._pieces)


def open_groups(folder: Path, files: Iterable[str]) -> dict[str, StoredTensors]:
    """Open the safetensors files of a checkpoint, by group: ``<group>.safetensors`` and ``<group>.<rank>.safetensors``.

    Raises:
        ValueError: rows of a tensor are missing; names it.
    """
    groups: dict[str, list[Path]] = {}
    for name in files:
        if name.endswith(".safetensors"):
            groups.setdefault(name.partition(".")[0], []).append(folder / name)
    return {group: StoredTensors(found) for group, found in groups.items()}
