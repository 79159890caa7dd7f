"""What one or more slices of a cut step run."""

import dataclasses
from typing import Any

from attention_offload.converter.program import Equation, run


@dataclasses.dataclass(frozen=True, eq=False)
class Executable:
    """A function of arrays that one or more slices run.

    Attributes:
        equations: over local numbers; parameters are 0, 1, ...
        parameters: how many arrays it takes.
        outputs: local numbers of what it returns.
    """

    equations: tuple[Equation, ...]
    parameters: int
    outputs: tuple[int, ...]

    def __call__(self, *arrays: Any) -> tuple[Any, ...]:
        """Computes the slice; jit this."""
        values = dict(enumerate(arrays))
        run(self.equations, values)
        return tuple(values[output] for output in self.outputs)
