"""What the image takes from the package index: requirements.txt and constraints.txt for pip.

    python3 tools/image_dependencies.py FOLDER

The requirements are pyproject.toml's, with the extras of the image. The constraints keep what the
base image was built around at the base's own versions; the rest of what it brings is left to pip,
which replaces only what a requirement rules out; and what it lacks comes as in constraints.txt.
Needs nothing but Python, since it runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("megatron", "plots", "hf", "data")

# Compiled against each other in NVIDIA's image.
BUILT_TOGETHER = re.compile(
    r"(torch|torch-?vision|torch-?audio|torchao|torch-tensorrt|pytorch-triton|triton|apex|numpy"
    r"|flash-attn.*|transformer-engine.*|nvidia-.*|cuda-.*)"
)


def canonical(name: str) -> str:
    """The name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> list[str]:
    """What pyproject.toml asks for, with the image's extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]


def constraints(installed: dict[str, str]) -> list[str]:
    """Exact versions, where `installed` maps the canonical names in the base to their versions."""
    kept = [f"{n}=={v}" for n, v in sorted(installed.items()) if BUILT_TOGETHER.fullmatch(n)]
    pinned = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
        and ((name := canonical(line.split("==")[0])) not in installed or name == "megatron-core")
    ]
    return kept + pinned


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    installed: dict[str, str] = {}
    for distribution in distributions():  # the first on sys.path is the one that is imported
        installed.setdefault(canonical(distribution.name), distribution.version)
    for name, lines in (
        ("requirements.txt", requirements()),
        ("constraints.txt", constraints(installed)),
    ):
        (folder / name).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
