"""The section about the order in which runs start, and the disk that they need."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import Field

from qwen_pipeline.config.sections import Section

Priority = Annotated[int, Field(ge=-1000, le=1000)]


class Queue(Section):
    """The order in which runs of new fine-tunes start, and the condition for it.

    Attributes:
        priority: Pattern of names of fine-tunes -> priority of their runs; the first that matches counts. It is added
            to that of the recipe, the default is 0, and runs of a higher priority start first.
        small_first: Whether among runs of the same priority those of smaller models start first, also when the disk has
            no space for a larger one that came before.
        reserve_disk: Whether a run is only requested once the disk of the store has space for all that it will write,
            beside what unfinished runs will still write.
        spare_gb: Space that stays free, in GB.
    """

    priority: Mapping[str, Priority] = Field(default_factory=dict[str, int])
    small_first: bool = False
    reserve_disk: bool = True
    spare_gb: float = Field(default=0, ge=0, allow_inf_nan=False)

    def priority_of(self, fine_tune: str) -> int:
        return next((each for pattern, each in self.priority.items() if fnmatchcase(fine_tune, pattern)), 0)
