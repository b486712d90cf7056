"""What is wrong with a weight file: every problem at once, under the name of the file."""

from collections.abc import Sequence

_LISTED = 40  # problems that a message spells out; a wrong model can have hundreds


class WeightsError(ValueError):
    """Weights that cannot be used. `problems` holds all that was found, however many are shown."""

    def __init__(self, source: str, problems: Sequence[str]):
        # ValueError keeps both as its arguments, so the error can be pickled to another process.
        super().__init__(source, problems)
        self.source = source
        self.problems = tuple(problems)

    def __str__(self) -> str:
        count = len(self.problems)
        lines = [f"{self.source}: {count} problem{'' if count == 1 else 's'}"]
        lines += [f"  - {problem}" for problem in self.problems[:_LISTED]]
        if count > _LISTED:
            lines.append(f"  and {count - _LISTED} more")
        return "\n".join(lines)
