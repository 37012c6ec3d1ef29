"""Words for people: one line of an error, a number of bytes, a time, a table; what is a number."""

from __future__ import annotations

import io
import os
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Collection, Sequence
from typing import Any

LONGEST_LINE = 500
# As messages have it: what ends a sentence, a quotation or a bracket comes after it. urllib3's have
# "url: " and no host. ``a::b`` is fsspec's chain of two. Without limits it would take a long time.
_CHAINED = r"::[a-z0-9+.-]{1,30}(?:://|::)"
_URL = re.compile(
    rf"""([a-z][a-z0-9+.-]{{0,30}}://|(?<=url:\ )/)
    ((?:(?!{_CHAINED})[^\s"<>])+?)
    (?=[:,;.)\]}}']{{0,9}}(?:[\s"<>]|$|{_CHAINED}))""",
    re.IGNORECASE | re.VERBOSE,
)
# The second: of a password with an unescaped slash or question mark. Digits there are a port.
_USER = re.compile(r"[^/?#]*@|[^/?#@:\[]+:(?!\d*(?:[/?#]|$)).*@")
# What stands before their @ is a container or a repository.
_WITHOUT_USERS = ("abfs", "abfss", "adl", "az", "git", "github", "wasb", "wasbs")

# What a terminal obeys, but for line ends and tabs: C0 and C1 controls, and what changes the
# direction of text.
_CONTROLS = [*range(32), *range(127, 160), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F)]
_CONTROLS += range(0x2066, 0x206A)
_ESCAPED = {c: ascii(chr(c))[1:-1] for c in _CONTROLS if chr(c) not in "\n\t"}
_COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")
_CURSOR_UP = re.compile(r"(\x1b\[A)+")


def ready_output(*, colours: bool = False) -> None:
    """Of a command, first of all: it prints wherever its output goes; Ctrl-C ends it in silence.

    Names of folders, arguments in checkpoints and the like are others' to choose: what a terminal
    would obey in them is printed as its number, as `visible` has it, by whoever prints.

    Where that cannot hold a character (ASCII has no arrow, UTF-8 not every name on a disk), its
    number is printed. An output that was closed (``>&-``) is none: Python has None in its place,
    and would give its descriptor to the next file that is opened.

    Args:
        colours: leave colours in what is printed, for a process in which other programs print, too.
    """
    show = visible_but_colours if colours else visible
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (to the end)
        elif isinstance(stream, io.TextIOWrapper) and (
            (stream.encoding, stream.errors) != ("utf-8", "surrogateescape")  # which hold all
        ):
            stream.reconfigure(errors="backslashreplace")
        if isinstance(stream, io.TextIOWrapper) and not isinstance(stream.write, _Visibly):
            # Of the stream itself, which handlers of logs may hold already.
            stream.write = _Visibly(stream.write, show)  # type: ignore[method-assign]
    sys.excepthook = _excepthook


def visible(text: str) -> str:
    """With the number of each character that a terminal would obey: ``\\x1b``."""
    return text.translate(_ESCAPED)


def visible_but_colours(text: str) -> str:
    """`visible`, and its colours as they are."""
    parts = _COLOUR.split(text)
    return "".join(part if i % 2 else visible(part) for i, part in enumerate(parts))


def print_coloured(text: str) -> None:
    """Print what has colours of our own in it, all else being `visible`."""
    write = sys.stdout.write
    (write.as_it_is if isinstance(write, _Visibly) else write)(text + "\n")


class _Visibly:
    """The ``write`` of a stream, `visible` but for lines of progress.

    Those are rewritten: a carriage return comes first, in a line that has nothing or progress. Of
    several, as tqdm has them, the cursor goes up to the first.
    """

    def __init__(self, write: Callable[[str], int], show: Callable[[str], str]) -> None:
        self.as_it_is, self._show = write, show
        self._progress, self._empty = False, True  # what the line has

    def __call__(self, text: str) -> int:
        if self._progress and _CURSOR_UP.fullmatch(text):
            return self.as_it_is(text)
        again = text.startswith("\r") and (self._progress or self._empty)
        shown = "\r" + self._show(text[1:]) if again else self._show(text)
        if shown:
            self._progress, self._empty = again and "\n" not in shown, shown.endswith("\n")
        return self.as_it_is(shown)


def _excepthook(kind: type[BaseException], *rest: Any) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, *rest)


def printable(line: str, stream: Any) -> str:
    """The line as ``stream``, which may be a script's of ASCII, can take it."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return line.encode(encoding, "backslashreplace").decode(encoding)


def first_line(text: str) -> str:
    """The first line that is not empty, without the spaces around it."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def without_secrets(text: str) -> str:
    """The text with its URLs bare of what gives access: user, password, query and fragment."""
    return _URL.sub(_without_secrets, text) if "/" in text else text


def _without_secrets(match: re.Match[str]) -> str:
    start, rest = match.groups()
    scheme = start.rpartition("://")[0].lower()
    if scheme == "file":
        return match[0]
    if start != "/" and scheme not in _WITHOUT_USERS:
        rest = _USER.sub("", rest, count=1) if _USER.match(rest) else rest
    path, _, query = rest.partition("?")
    if scheme in ("", "http", "https"):
        path = path.partition("#")[0]
    elif "=" not in query:  # of a name, in a bucket for example
        path = rest
    return start + path


def one_line(error: BaseException) -> str:
    """All that an exception says, in one line; a path in it may have line ends."""
    return " ".join(filter(None, map(str.strip, _said(error).splitlines())))


def _said(error: BaseException) -> str:
    return without_secrets(str(error))


def describe(error: BaseException) -> str:
    """An exception with its type, in one line of limited length."""
    return f"{type(error).__name__}: {first_line(_said(error))}"[:LONGEST_LINE]


def reason(error: BaseException) -> str:
    """What an exception says, in one line; its type where it says nothing."""
    return first_line(_said(error)) or type(error).__name__


def size(number: float) -> str:
    """A number of bytes: 12.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def table(rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> str:
    """Cells as columns two spaces apart; those of ``left`` (from 0) flush left, others right."""
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        spaces = [" " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = zip(row, spaces, strict=True)
        lines.append(
            "  ".join(
                cell + space if place in left else space + cell
                for place, (cell, space) in enumerate(cells)
            ).rstrip()
        )
    return "\n".join(lines)


def _width(text: str) -> int:
    """Columns of a terminal."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def now() -> str:
    """The time, as ISO 8601 has it, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can hold it, as it cannot half of a pair of surrogates (of JSON, of a name)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_number(word: str) -> bool:
    """Whether a word is a number: a weight, in a list of data, and not a prefix of files."""
    try:
        float(word)
    except ValueError:
        return False
    return True
