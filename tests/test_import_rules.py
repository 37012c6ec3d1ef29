"""What the import contracts in pyproject.toml (``make lint``) cannot say."""

import ast
import subprocess
import sys
from pathlib import Path

import launch

PACKAGE = Path(__file__).parents[1] / "megatron_xielu"

WITHOUT_MEGATRON = """
import importlib, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "megatron":
            raise ImportError(f"{name} at import time")

assert "megatron" not in sys.modules
sys.meta_path.insert(0, Refuse())
for name in sys.argv[1:]:
    room = importlib.import_module(name)
    for module in pkgutil.walk_packages(room.__path__, f"{name}."):
        importlib.import_module(module.name)
"""


def test_rooms_that_are_imported_without_megatron():
    rooms = [f"megatron_xielu.{room}" for room in "checkpoints convert hf plan report".split()]
    command = [launch.python(), "-c", WITHOUT_MEGATRON, *rooms]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_ground_is_the_standard_library():
    for file in [*PACKAGE.glob("common/*.py"), *PACKAGE.glob("catalog.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            roots = {name.partition(".")[0] for name in names}
            assert roots <= {*sys.stdlib_module_names, "megatron_xielu"}, file
