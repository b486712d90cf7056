"""What all tables and files have in common: strictness, columns, units, a title, joint rules."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from nfflax.spec.check import Finding

MAX_STAGES = 16  # entries of a column: far beyond any network


def as_tuple(value: Any) -> Any:
    """A list as a tuple, which a frozen table can hold; anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def by_key(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The values of nested tables by dotted key."""

    def walk(table: Mapping[str, Any], start: str) -> Iterator[tuple[str, Any]]:
        for key, value in table.items():
            if isinstance(value, Mapping):
                yield from walk(value, f"{start}{key}.")
            else:
                yield f"{start}{key}", value

    return dict(walk(tables, ""))


class Table(BaseModel):
    """A table of the file: immutable, no unknown keys, no silent conversions, no NaN."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    columns: ClassVar[tuple[str, ...]] = ()
    """Keys with one value per entry: a scalar is spread over all of them."""
    per_channel: ClassVar[tuple[str, ...]] = ()
    """Keys with one value for all channels, or one for each."""
    either: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Pairs of keys that say the same in two units: the one given last sets the other to 0."""
    file_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of files that are used up in reading them."""

    @model_validator(mode="before")
    @classmethod
    def _spread_scalars(cls, data: Any) -> Any:
        if not cls.columns or not isinstance(data, dict):
            return data
        defaults = {k: cls.model_fields[k].default for k in cls.columns if k not in data}
        defaults = {k: v for k, v in defaults.items() if isinstance(v, int | float | str)}
        length = column_length(data, cls.columns)
        spread = {k: v for k, v in (defaults | data).items() if k in cls.columns}
        return data | {
            # one entry too many is an error; a million too many would be a million errors
            k: v[: MAX_STAGES + 1] if isinstance(v, list | tuple) else (v,) * length
            for k, v in spread.items()
        }

    @model_validator(mode="before")
    @classmethod
    def _one_unit(cls, data: Any) -> Any:
        """A key of a pair that is given leaves no default to the other."""
        return other_units(cls, data) | data if isinstance(data, dict) else data


def other_units(table: type[Table], data: Mapping[Any, Any]) -> dict[str, int]:
    """The zeros that follow from keys that say a thing in one unit, and not in the other."""
    pairs = [(key, other) for pair in table.either for key, other in (pair, pair[::-1])]
    return {other: 0 for key, other in pairs if data.get(key) and other not in data}


def column_length(data: dict[str, Any], columns: Sequence[str]) -> int:
    """How many entries columns have: those of the first one that is a list (1 without lists)."""
    lists = [data[k] for k in columns if isinstance(data.get(k), list | tuple) and data[k]]
    return min(len(lists[0]), MAX_STAGES + 1) if lists else 1


class Title(Table):
    """What stands above the tables."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=100)
    """What the variant is called."""
    summary: str = Field(default="", max_length=1000)
    """One line on what it is and where its numbers come from."""


class Document(Title):
    """A whole file: a title, and tables with rules between them."""

    noun: ClassVar[str]
    """What a file of this kind describes."""
    presets: ClassVar[str]
    """Folder of the shipped files that are complete."""
    bases: ClassVar[str] = ""
    """Folder of the shipped files that can only be extended."""

    def values_by_key(self) -> dict[str, Any]:
        """All that it says, by dotted key and as JSON has it, but what it is called."""
        return by_key(self.model_dump(mode="json", exclude={"name", "summary"}))

    @classmethod
    def problems_between(cls, tables: Mapping[str, Any]) -> "list[Finding]":
        """Every broken rule among the tables that are themselves valid; the others are skipped."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _joint_rules(self) -> "Document":
        found = self.problems_between({k: getattr(self, k) for k in type(self).model_fields})
        if found:
            raise ValueError("; ".join(f"{key}: {message}" for key, message, *_ in found))
        return self
