"""What the fuzzer tries, and what it may do."""

import dataclasses
import functools
import pathlib
import random
from collections.abc import Callable, Collection, Sequence
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.mutate import Input


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader of inputs.

    Attributes:
        share: its part of all cases, as a weight.
        inputs: makes valid inputs.
        mutators: by ending of a file's name, see `mutate.damage_folder`.
        read: reads the input in a folder, which is the working folder.
        raises: what it documents.
        words: besides file names, words of which one must stand in a message: keys, or what the
            thing is called.
        peak: bytes of memory that an input may take at most.
        seconds: of processor time that an input may take at most.
    """

    share: int
    inputs: Callable[[], Sequence[Input]]
    mutators: dict[str, mutate.Mutator]
    read: Callable[[pathlib.Path], Any]
    raises: tuple[type[BaseException], ...] = (ValueError,)
    words: Callable[[], Collection[str]] = tuple
    peak: int = 256 * 2**20
    seconds: float = 10.0

    def corpus(self) -> Sequence[Input]:
        """The valid inputs, made once."""
        return _made(self.inputs)

    def case(self, name: str, seed: int, case: int) -> Input:
        """The damaged input of a case: the same whenever it is asked for."""
        draw = random.Random(f"{name}/{seed}/{case}")
        corpus = self.corpus()
        return mutate.damage_folder(self.mutators, draw, draw.choice(corpus), corpus)


@functools.cache
def _made(inputs: Callable[[], Sequence[Input]]) -> Sequence[Input]:
    return inputs()
