"""What documents name exists: links, headings, files, modules; and the documents code names."""

import re
from pathlib import Path

import megatron.core
import pytest
from launch import REPOSITORY

PACKAGE = REPOSITORY / "megatron_xielu"
HIDDEN = {"runs", "build", "node_modules"}


def files(*patterns: str) -> list[Path]:
    found = (path for pattern in patterns for path in REPOSITORY.rglob(pattern))
    return sorted(
        path
        for path in found
        if not any(
            part in HIDDEN or part.startswith(".") for part in path.relative_to(REPOSITORY).parts
        )
    )


DOCUMENTS = files("*.md")


def anchors(document: Path) -> set[str]:
    """Of every heading, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def names_something(dotted: str) -> bool:
    """Whether ``megatron_xielu.a.b.C`` is a module, or a name in one."""
    module, *rest = dotted.split(".")
    path = REPOSITORY / module
    while (
        rest and path.is_dir() and ((path / rest[0]).is_dir() or (path / f"{rest[0]}.py").exists())
    ):
        path /= rest.pop(0) if (path / rest[0]).is_dir() else f"{rest.pop(0)}.py"
    source = path / "__init__.py" if path.is_dir() else path
    return source.exists() and (not rest or bool(re.search(rf"\b{rest[0]}\b", source.read_text())))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_what_a_document_names_exists(document):
    text = document.read_text()
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http:", "https:")):
            continue
        name, _, heading = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        if not target.exists() or (heading and heading not in anchors(target)):
            wrong.append(link)
    # Paths are from the root, the document or the package; Megatron's own from its folder.
    megatron_folder = Path(megatron.core.__file__).parents[1]
    roots = (REPOSITORY, document.parent, PACKAGE, megatron_folder, megatron_folder.parent)
    name = r"(?<![\w./~…*-])[\w.-]+(?:/[\w.-]+)+\.(?:py|sh|md|sbatch|yaml|patch|toml)\b"
    for path in re.findall(name, re.sub(r"\]\([^)]*\)", "]", text)):
        if not any((root / path).exists() for root in roots):
            wrong.append(path)
    wrong += [
        dotted
        for dotted in re.findall(r"\bmegatron_xielu(?:\.\w+)+", text)
        if not names_something(dotted)
    ]
    assert not wrong


def test_documents_that_the_code_names_exist():
    named = {
        document
        for path in files("*.py", "*.sh")
        for document in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text())
    }
    assert named and all((REPOSITORY / document).exists() for document in named), sorted(named)


def test_every_document_is_in_the_index():
    folder = REPOSITORY / "docs"
    index = (folder / "README.md").read_text()
    missing = [
        name
        for path in folder.rglob("*.md")
        if (name := str(path.relative_to(folder))) != "README.md" and f"({name})" not in index
    ]
    assert not missing


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 120
