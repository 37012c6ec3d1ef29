"""The container image's files and every shell script, as far as they can be judged without a build.

`make test-image` builds the image.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
LISTED = subprocess.run(
    ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT,
    capture_output=True,
    text=True,
).stdout.split("\0")
FILES = [ROOT / name for name in LISTED if name and (ROOT / name).is_file()]
CONSTRAINTS = (ROOT / "constraints.txt").read_text().split()

needs_git = pytest.mark.skipif(not FILES, reason="needs a git checkout to list the files")


def image_dependencies():
    spec = importlib.util.spec_from_file_location("deps", ROOT / "tools/image_dependencies.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hadolint():
    done = subprocess.run(
        [BIN / "hadolint", ROOT / "Dockerfile"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0 and not done.stdout, done.stdout.decode()


@needs_git
def test_shellcheck():
    scripts = [
        file for file in FILES if file.suffix in (".sh", ".sbatch") or file == ROOT / ".ci/run"
    ]
    assert ROOT / ".ci/run" in scripts and ROOT / "tools/build_image.sh" in scripts
    done = subprocess.run(
        [BIN / "shellcheck", "--external-sources", "--source-path=SCRIPTDIR", *scripts],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout.decode()


@needs_git
def test_nothing_installs_apex_from_the_index():
    """That name belongs to an unrelated project. The texts may say so, and say never."""
    command = re.compile(r"\b(pip3?|uv)\b.*\binstall\b[^#\n]*?[\s\"'=]apex\b(?![-/])", re.I)
    offending = []
    for file in FILES:
        try:
            lines = file.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(lines, 1):
            before = " ".join(lines[max(0, number - 2) : number])
            if command.search(line) and not re.search(r"\bnever\b", before, re.I):
                offending.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()}")
    requirements = [*image_dependencies().requirements(), *CONSTRAINTS]
    assert not offending and not any(re.match(r"apex\b", line) for line in requirements), offending


def test_the_container_engines_file():
    """Its hooks are switched by strings; the image and the folder lie in what is mounted."""
    given = tomllib.loads((ROOT / "examples/slurm/environment.toml").read_text())
    hook = given["annotations"]["com"]["hooks"]["aws_ofi_nccl"]
    assert hook == {"enabled": "true", "variant": "cuda13"}
    [mounted] = {mount.partition(":")[0] for mount in given["mounts"]}
    assert all(given[path].startswith(f"{mounted}/") for path in ("image", "workdir"))


def test_versions_come_from_the_constraints():
    dockerfile = (ROOT / "Dockerfile").read_text()
    for pin in re.findall(r"[\w.-]+==[\w.]+", dockerfile):
        assert pin in CONSTRAINTS
    assert re.search(r"^ARG BASE_IMAGE=\S+:\d\d\.\d\d-py3$", dockerfile, re.M)

    series = next(c for c in CONSTRAINTS if c.startswith("megatron-core==")).split("==")[1]
    named = re.search(r"Megatron-LM core_v(\d+\.\d+)", dockerfile).group(1)
    assert series.startswith(named + "."), "the base image was chosen for another Megatron"


def test_the_constraints_have_no_fault_that_the_bounds_exclude():
    """Every requirement is met by its pin, and beside every advisory is a bound."""
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)
    canonical = image_dependencies().canonical
    pins = {canonical(name): v for name, _, v in (line.partition("==") for line in CONSTRAINTS)}
    groups = [*project["project"]["optional-dependencies"].values()]
    groups += [project["project"]["dependencies"], project["build-system"]["requires"]]
    for wanted in (Requirement(line) for group in groups for line in group):
        if wanted.name != "megatron_xielu":
            assert wanted.specifier.contains(pins[canonical(wanted.name)]), wanted
    advised = [line.split("#")[0] for line in text.splitlines() if re.match(r"[^#]+#.*CVE-", line)]
    assert len(advised) > 8 and all(">=" in line for line in advised), advised


def test_what_all_may_write_to_and_what_is_built_with():
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert not re.search(r"chmod\b[^&]*(\b[0-7]*[2367] |[oa]\+\w*w)", dockerfile)
    assert "\nUSER 10001:0\n" in dockerfile
    installs = [run for run in dockerfile.split("\nRUN ") if "pip install" in run]
    assert [line for line in installs if "pip==" not in line]
    assert all("pip==" in run or "PIP_BUILD_CONSTRAINT=constraints.txt" in run for run in installs)


def test_the_base_keeps_what_it_was_built_around():
    base = {
        "torch": "2.13.0a0+0123456789.nv26.6",
        "transformer-engine": "2.16.0",
        "apex": "0.1",
        "requests": "2.30.0",
        "megatron-core": "0.18.0",
    }
    chosen = image_dependencies().constraints(base)
    assert {"torch==2.13.0a0+0123456789.nv26.6", "transformer-engine==2.16.0"} < set(chosen)
    # pip decides on what else the base has; Megatron is ours to choose; the rest is pinned.
    assert not any(line.startswith("requests==") for line in chosen)
    assert [c for c in CONSTRAINTS if c.startswith("megatron-core==")] == [
        line for line in chosen if line.startswith("megatron-core")
    ]
    plain = image_dependencies().constraints({})
    assert [line for line in plain if line.startswith("torch==")] == [
        line for line in CONSTRAINTS if line.startswith("torch==")
    ]


def build_image(*options: str, programs: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [ROOT / "tools/build_image.sh", *options],
        env={"PATH": f"{programs}:/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder of programs that only write down how they are called: engines cannot run here."""
    for name in ("docker", "buildah", "apptainer", "enroot"):
        program = tmp_path / name
        said = f'echo {name} "$@" >>"{tmp_path}/calls"\n[ "$2" != imagetools ] || echo sha256:0f\n'
        program.write_text(f"#!/bin/sh\n{said}")
        program.chmod(0o755)
    return tmp_path


@needs_git
def test_build_image_calls(programs: Path):
    done = build_image(
        *("--tag", "registry.example/x:1", "--base", "debian:13", "--push"),
        *("--sif", f"{programs}/x.sif", "--enroot", f"{programs}/x.sqsh"),
        *("--", "--build-arg", "NLTK_PACKAGES=punkt_tab"),
        programs=programs,
        GIT_CONFIG_COUNT="1",
        GIT_CONFIG_KEY_0="safe.directory",
        GIT_CONFIG_VALUE_0="*",
    )
    assert done.returncode == 0, done.stderr
    assert "its base is --base debian@sha256:0f\n" in done.stdout
    _, build, digest, push, save, sif, enroot = (programs / "calls").read_text().splitlines()
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    dirty = subprocess.check_output(["git", "status", "--porcelain"], cwd=ROOT)
    assert f"--build-arg COMMIT={commit}{'-dirty' if dirty else ''} " in build
    assert "--build-arg BASE_IMAGE=debian:13" in build
    assert build.endswith(f"--build-arg NLTK_PACKAGES=punkt_tab {ROOT}")
    assert digest.endswith(" debian:13")
    assert push == "docker push registry.example/x:1"
    assert save.startswith("docker save --output ") and sif.startswith("apptainer build ")
    assert enroot == f"enroot import --output {programs}/x.sqsh dockerd://registry.example/x:1"
    assert not list(programs.glob(".image.*"))


BOTH = "linux/amd64,linux/arm64"
FOREIGN = "linux/amd64" if platform.machine() == "aarch64" else "linux/arm64"


@needs_git
@pytest.mark.parametrize(
    ("builder", "platforms", "calls"),
    [
        ("docker", FOREIGN, [f"buildx build --load --platform {FOREIGN} --tag", "push"]),
        ("docker", BOTH, [f"buildx build --push --platform {BOTH} --tag"]),
        (
            "buildah",
            BOTH,
            ["manifest rm", f"build --platform {BOTH} --manifest", "manifest push --all"],
        ),
    ],
)
def test_build_image_for_platforms(programs: Path, builder: str, platforms: str, calls: list[str]):
    """On a machine with emulators for both, as this may not be."""
    for one in ("x86_64", "aarch64"):
        (programs / f"qemu-{one}").touch()
    (programs / "docker").write_text(
        f'#!/bin/sh\necho "$@" >>"{programs}/calls"\necho "Platforms: linux/amd64, linux/arm64*"\n'
    )
    script = programs / "tools/build_image.sh"
    for name in ("megatron_xielu/__init__.py", "Dockerfile", "tools/build_image.sh"):
        (programs / name).parent.mkdir(exist_ok=True)
        text = (ROOT / name).read_text().replace("/proc/sys/fs/binfmt_misc", str(programs))
        (programs / name).write_text(text)
    tag = "registry.example/x:1"
    done = subprocess.run(
        ["bash", script, "--builder", builder, "--platform", platforms, "--tag", tag, "--push"],
        env={"PATH": f"{programs}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = (programs / "calls").read_text().replace("buildah ", "").splitlines()
    said = [line for line in lines if re.search(r"\b(buildx )?build |push|\brm ", line)]
    assert [line.startswith(f"{call} {tag}") for line, call in zip(said, calls, strict=True)] == [
        True
    ] * len(calls), said


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--push"], "--tag"),
        (["--platform", "linux/riscv64"], "choose linux/amd64, linux/arm64 or"),
        (["--platform", BOTH], "needs --push: docker keeps the images of one platform"),
        (["--platform", BOTH, "--sif", "x.sif"], "--sif and --enroot take one platform"),
        (["--platform", FOREIGN], "docker cannot run its programs on this"),
        (["--builder", "kaniko"], "kaniko"),
        (["--sif"], "--sif"),
        (["--tag", "--push"], "--tag"),
        (["--colour"], "--colour"),
        (["--builder", "buildah", "--enroot", "x.sqsh"], "enroot"),
    ],
)
def test_build_image_errors(programs: Path, options: list[str], named: str):
    done = build_image(*options, programs=programs)
    assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1


def test_build_image_names_what_is_missing(tmp_path: Path):
    for name in ("bash", "dirname", "sed", "git"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    done = subprocess.run(
        ["/bin/bash", ROOT / "tools/build_image.sh"],
        env={**os.environ, "PATH": str(tmp_path), "BUILDER": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert all(name in done.stderr for name in ("docker", "podman", "buildah"))
