"""How weights are quantised that were quantised before we came: what a checkpoint says of it, in one shape for all.

Knows words and numbers; where the bytes lie and what they mean is known in `quantized/`. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

NF4, INT8, GROUPED, OTHER = "nf4", "int8", "grouped", "other"


@dataclass(frozen=True)
class Coding:
    """How the numbers of one weight are coded.

    `kind` says what its rows come as (`quantized/coded.py`): "nf4", "int8" (one scale a row), "grouped" (whole numbers
    with a scale and a zero for each `group` of columns), or "other", whose numbers have to be worked out. `layout` says
    how its bytes lie (`quantized/registry.py`), and `block` how many rows and columns share a scale there. `group` is 0
    where a row has one scale. `is_reordered` tells that columns are in groups in another order than side by side.
    """

    kind: str
    layout: str
    bits: int
    group: int = 0
    is_symmetric: bool = True
    is_reordered: bool = False
    block: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Quantized:
    """What config.json says of weights that are quantised already.

    `name` is the method's for people, `method` as the file has it. `group` is how many columns share a scale: 0 for
    all of a row, None where the method has no such thing. `left_out` are the modules that were not converted, as the
    file names them. `note` is what else a person should know.
    """

    method: str
    name: str
    bits: int
    group: int | None = None
    is_symmetric: bool = True
    is_reordered: bool = False
    left_out: tuple[str, ...] = ()
    note: str = ""

    @property
    def summary(self) -> str:
        """The description in a few words: "AWQ, 4 bits, groups of 128"."""
        words = [self.name, f"{self.bits} bits"]
        if self.group is not None:
            words.append(f"groups of {self.group}" if self.group else "one scale a row")
        if not self.is_symmetric:
            words.append("with zero points")
        if self.is_reordered:
            words.append("act-order")
        return ", ".join([*words, *([self.note] if self.note else [])])
