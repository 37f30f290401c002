"""Classes as people name them: by index, by name, in any case."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

SHOWN = 12  # names listed in a message before the rest is counted


class ClassNames:
    """The `names` of a model's classes, by index; the null class comes after the last one. `model` is for messages."""

    def __init__(self, names: Sequence[str], model: str):
        self.names, self.model = tuple(names), model

    @property
    def null_class(self) -> int:
        """Index of the class that means "unconditional"."""
        return len(self.names)

    def name(self, index: int) -> str:
        """Name of a class, "null" for the null class."""
        return "null" if index == self.null_class else self.names[index]

    def indices(self, classes: Sequence[int | str] | Tensor) -> list[int]:
        """Indices of classes given by index or name.

        Raises `ValueError` for an empty list, an unknown or repeated class, `TypeError` for other kinds of values.
        """
        if isinstance(classes, str) or not isinstance(classes, Iterable):
            raise TypeError(f"classes: expected a list of indices or names, got {classes!r}")
        values = classes.tolist() if isinstance(classes, Tensor) else list(classes)
        if not values:
            raise ValueError("classes: expected at least one class, got none")
        indices = [self._index(value) for value in values]
        if len(set(indices)) != len(indices):
            repeated = sorted({self.name(i) for i in indices if indices.count(i) > 1})
            raise ValueError(f"classes: named more than once: {', '.join(repeated)}")
        return indices

    def _index(self, value: int | str) -> int:
        if isinstance(value, str):
            if value in self.names:
                return self.names.index(value)
            folded = [i for i, name in enumerate(self.names) if name.casefold() == value.casefold()]
            if len(folded) == 1:
                return folded[0]
            if not value.isdecimal():
                raise ValueError(f"classes: {self.model} knows no class {value!r}; its classes are {self._known()}")
        elif isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"classes: expected indices or names, got {value!r}")
        index = int(value)
        if not 0 <= index <= self.null_class:
            raise ValueError(
                f"classes: expected indices from 0 to {self.null_class - 1} ({self.null_class}: null), got {value}"
            )
        return index

    def _known(self) -> str:
        shown = ", ".join(self.names[:SHOWN])
        return shown if len(self.names) <= SHOWN else f"{shown} and {len(self.names) - SHOWN} more"
