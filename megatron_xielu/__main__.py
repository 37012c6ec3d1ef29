"""``python -m megatron_xielu``: lists the commands of this package, and says its version.

What is said of a command is the first line of its file's docstring. Standard library only: it reads
the files and imports none.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from megatron_xielu import __version__
from megatron_xielu.common import text

_PACKAGE = Path(__file__).parent
_TOOLS = _PACKAGE.parent / "tools"  # where this is a checkout


def commands() -> dict[str, str]:
    """What to type, and what it does, of every file that is a command."""
    found = {}
    for file in sorted(_PACKAGE.rglob("*.py")):
        module = ".".join(file.relative_to(_PACKAGE.parent).with_suffix("").parts)
        if file != Path(__file__) and (said := _first_line(file)):
            found[f"python -m {module.removesuffix('.__main__')}"] = said
    if (_TOOLS / "prepare_data.py").exists():
        for file in sorted(_TOOLS.rglob("*.py")):
            if said := _first_line(file):
                found[f"python {file.relative_to(_TOOLS.parent)}"] = said
    return found


def _first_line(file: Path) -> str:
    """Of the docstring of a command; empty where the file is none."""
    source = file.read_text(encoding="utf-8")
    if '\nif __name__ == "__main__":' not in source:
        return ""
    return text.first_line(ast.get_docstring(ast.parse(source)) or "").replace("``", "")


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        SystemExit: an argument is not known.
    """
    if argv == ["--version"]:
        print(f"megatron_xielu {__version__}")
        return
    known = commands()
    if argv and argv not in (["-h"], ["--help"]):
        meant = f"python -m megatron_xielu.{argv[0]}"
        instead = f"it is {meant}" if meant in known else "--version, or nothing for the commands"
        print(
            f"megatron_xielu: error: {' '.join(argv)[:100]!a} is no argument of this; {instead}",
            file=sys.stderr,
        )
        raise SystemExit(2)
    width = max(map(len, known))
    lines = [f"{command:{width}}  {said}" for command, said in known.items()]
    lines.append("--help behind one of them says more, and so does docs/README.md.")
    print("\n".join(lines))  # at once: whoever reads the first may leave


if __name__ == "__main__":
    text.ready_output()
    main(sys.argv[1:])
