"""Pickles that are not honest or not whole, and a place to read them where a crash hurts nobody."""

import io
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

import nfflax
from nfflax.weights.errors import WeightsError

Reader = Callable[[Path], Any]

NOTHING_RAN = "nothing in the file was executed"


def read_as(reader: Reader, path: Path, content: bytes) -> Any:
    """What a reader makes of a file with this content."""
    path.unlink(missing_ok=True)  # some file systems wait for the disk to overwrite
    path.write_bytes(content)
    return reader(path)


def refusal_of(reader: Reader, path: Path, content: bytes) -> str:
    """What a reader says as it refuses a file with this content; its error names the file."""
    with pytest.raises(WeightsError) as caught:
        read_as(reader, path, content)
    assert caught.value.source == str(path)
    return str(caught.value)


def text(value: str) -> bytes:
    """The operation that puts text on the stack."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def program(*operations: bytes) -> bytes:
    return b"\x80\x04" + b"".join(operations) + b"."


def nested(value: bytes) -> bytes:
    """A tuple whose text would have 2**60 times the length of its value's."""
    return value + b"".join(b"\x94h" + bytes([n]) + b"\x86" for n in range(60))


def written(saved: bytes, *records: tuple[str | zipfile.ZipInfo, bytes], **how) -> bytes:
    """torch.save's zip format."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", **how) as file:
        for name, content in [("w/data.pkl", saved), *records]:
            file.writestr(name, content)
    return archive.getvalue()


def legacy(saved: bytes, keys: bytes = b"\x80\x02].", storages: bytes = b"") -> bytes:
    """torch.save's legacy format: a magic number, version 1001 and a description come first."""
    start = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + b"\x80\x02M\xe9\x03." + b"\x80\x02}."
    return start + saved + keys + storages


# Deep enough for C's stack in `read_elsewhere`, where hash() of it is a segmentation fault.
DEEP = b"N" + b"\x85" * 30_000


# What a hostile file may name
NAMES = [
    "os.system",
    "posix.system",
    "subprocess.Popen",
    "builtins.eval",
    "builtins.exec",
    "builtins.getattr",
    "__builtin__.eval",
    "operator.attrgetter",
    "functools.partial",
    "copyreg._reconstructor",
    "copyreg.__newobj__",
    "importlib.import_module",
    "numpy.load",
    "numpy.ndarray.tofile",
    "numpy.core.multiarray.fromfile",
    "pickle.loads",
]


def calls_of(name: str) -> list[bytes]:
    """Every way in which a program can call what it names."""
    module, _, function = name.rpartition(".")
    by_line = f"{module}\n{function}\n".encode()
    by_stack = text(module) + text(function) + b"\x93"
    return [
        program(b"c", by_line, text("x"), b"\x85R"),
        program(by_stack, text("x"), b"\x85R"),
        program(by_stack, b")\x81"),  # NEWOBJ
        program(by_stack, b")}\x92"),  # NEWOBJ_EX
        program(b"(i", by_line),  # INST
        program(b"(", by_stack, b"o"),  # OBJ
    ]


@st.composite
def mutated(draw, contents: list[bytes]) -> bytes:
    """One of the contents after up to six accidents."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(2, len(content) - 1))
        match draw(st.sampled_from(["set", "cut", "insert", "copy"])):
            case "set":
                content[at] = draw(st.integers(0, 255))
            case "cut":
                del content[at : at + draw(st.integers(1, 8))]
            case "insert":
                content[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "copy":
                start = draw(st.integers(2, len(content) - 1))
                content[at:at] = content[start : start + draw(st.integers(1, 60))]
        if len(content) < 8:
            break
    return bytes(content)


# Without the package itself, whose import takes seconds.
_READ_ALL = """
import sys, threading, types
root, module, function, *paths = sys.argv[1:]
for name in ("nfflax", "nfflax.weights"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [root + "/" + name.replace(".", "/")]
read = getattr(__import__(module, fromlist=[function]), function)
from nfflax.weights.errors import WeightsError

def read_all():
    for path in paths:
        try:
            print("read:", list(read(path)))
        except WeightsError as error:
            print(*error.problems)

threading.stack_size(2**20)
thread = threading.Thread(target=read_all)
thread.start()
thread.join()
"""


def read_elsewhere(read, paths: Iterable[Path]) -> list[str]:
    """What a reader says of each file, in another process with little room on C's stack."""
    root = str(Path(nfflax.__file__).parents[1])
    command = [sys.executable, "-c", _READ_ALL, root, read.__module__, read.__name__]
    run = subprocess.run(
        [*command, *map(str, paths)], capture_output=True, text=True, check=True, timeout=300
    )
    return run.stdout.splitlines()
