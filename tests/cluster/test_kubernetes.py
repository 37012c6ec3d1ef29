"""The Kubernetes example: valid for its APIs, and true to pretrain.sh.

No cluster runs here. Core kinds, and the jobs inside the operator's kinds, are checked by
Kubernetes' own schemas, in which an unknown key is an error. The operator's kinds are read into the
classes that it publishes and written back: what comes out must be what went in, since these classes
drop unknown keys, fill in missing ones and convert types. The container's command runs for real,
with a stand-in for pretrain.sh.
"""

from __future__ import annotations

import copy
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDER = EXAMPLES / "kubernetes"
PRETRAIN = "/opt/megatron_xielu/examples/pretrain.sh"
# The first with a stable podFailurePolicy, and the newest that the schemas know.
VERSIONS = ["1.31", kubernetes_validate.latest_version()]


def check(document: dict[str, Any]) -> None:
    """Raise unless the API server would take every key and value of ``document``."""
    # Seconds, which test runs of other rooms are spared.
    from kubeflow_trainer_api import models

    api_version, kind = document["apiVersion"], document["kind"]
    if api_version == "trainer.kubeflow.org/v1alpha1":
        if kind == "TrainingRuntime":
            for job in document["spec"]["template"]["spec"]["replicatedJobs"]:
                check({"apiVersion": "batch/v1", "kind": "Job", **job["template"]})
        known = vars(models)[f"TrainerV1alpha1{kind}"]
        assert known.from_dict(copy.deepcopy(document)).to_dict() == document
    else:  # an unknown kind raises SchemaNotFoundError
        for version in VERSIONS:
            kubernetes_validate.validate(document, version, strict=True)


def documents() -> dict[str, dict[str, Any]]:
    """Every manifest of the examples by its kind, that in the README included."""
    texts = [path.read_text() for path in sorted(FOLDER.glob("*.yaml"))]
    texts += re.findall(r"<<'END'\n(.*?)\nEND\n", (FOLDER / "README.md").read_text(), re.DOTALL)
    return {document["kind"]: document for text in texts for document in yaml.safe_load_all(text)}


def trainjob_spec() -> tuple[dict[str, Any], dict[str, Any]]:
    """The job's and the pod's specification which the operator makes of runtime and TrainJob."""
    runtime, trainer = documents()["TrainingRuntime"], documents()["TrainJob"]["spec"]["trainer"]
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    template = job["template"]
    template["spec"]["containers"][0]["env"] += trainer["env"]
    return job, template


def container() -> dict[str, Any]:
    (container,) = trainjob_spec()[1]["spec"]["containers"]
    return container


# --- valid ---------------------------------------------------------------------------------------


def test_the_kinds_are_those_that_are_meant():
    kinds = {"TrainingRuntime", "TrainJob", "PersistentVolumeClaim"}
    assert set(documents()) == kinds


@pytest.mark.parametrize("kind", documents())
def test_manifest_is_valid(kind):
    check(documents()[kind])


JOB = "spec template spec replicatedJobs 0 template spec"
POD = f"{JOB} template spec"


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        # A misspelt key: renamed, the value kept.
        ("TrainJob", "spec trainer numNodes", "rename"),
        ("TrainJob", "spec trainer env 0 value", "rename"),
        ("TrainingRuntime", "spec mlPolicy torch", "rename"),
        ("TrainingRuntime", f"{JOB} backoffLimit", "rename"),
        ("TrainingRuntime", f"{JOB} podFailurePolicy rules 0 onExitCodes containerName", "rename"),
        ("TrainingRuntime", f"{POD} terminationGracePeriodSeconds", "rename"),
        ("TrainingRuntime", f"{POD} containers 0 resources", "rename"),
        ("PersistentVolumeClaim", "spec accessModes", "rename"),
        # A value of another type.
        ("TrainJob", "spec trainer numNodes", "two"),
        ("TrainJob", "spec trainer env 0 value", 1),
        ("TrainingRuntime", f"{JOB} podFailurePolicy rules 0 onExitCodes values 0", "2"),
        ("TrainingRuntime", f"{POD} terminationGracePeriodSeconds", "600"),
        ("TrainingRuntime", f"{POD} securityContext runAsNonRoot", "yes"),
        ("PersistentVolumeClaim", "spec accessModes", "ReadWriteMany"),
        # A field that is missing.
        ("TrainJob", "spec runtimeRef", "delete"),
        ("TrainJob", "spec runtimeRef name", "delete"),
        ("TrainingRuntime", f"{JOB} podFailurePolicy rules 0 action", "delete"),
        ("TrainingRuntime", f"{POD} containers", "delete"),
        # Another kind.
        ("TrainJob", "kind", "TrainJobs"),
        ("PersistentVolumeClaim", "kind", "PersistentVolumeClaims"),
    ],
)
def test_a_mistake_is_caught(kind, path, value):
    document = documents()[kind]
    *parents, last = [int(step) if step.isdigit() else step for step in path.split()]
    place: Any = document
    for step in parents:
        place = place[step]
    if value == "rename":
        place[last + "s"] = place.pop(last)
    elif value == "delete":
        del place[last]
    else:
        assert place[last] != value
        place[last] = value
    with pytest.raises((AssertionError, ValueError, KeyError, kubernetes_validate.ValidationError,
                        kubernetes_validate.SchemaNotFoundError)):  # fmt: skip
        check(document)


def test_what_the_operator_refuses_beyond_its_schemas():
    # trainingruntime_webhook.go: the labelled job is single and has a container of this name.
    (replicated,) = documents()["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]
    labels = replicated["template"]["metadata"]["labels"]
    assert labels["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    assert replicated.get("replicas", 1) == 1
    assert container()["name"] == "node"
    # torch.go injects into the container only where there is a trainer, which may set no PET_*.
    job = documents()["TrainJob"]["spec"]
    assert not [entry for entry in job["trainer"]["env"] if entry["name"].startswith("PET_")]
    runtime = documents()["TrainingRuntime"]
    assert job["runtimeRef"]["kind"] == runtime["kind"]
    assert job["runtimeRef"]["name"] == runtime["metadata"]["name"]


def test_the_five_places_to_edit_are_marked():
    for path in FOLDER.glob("*.yaml"):
        assert set(re.findall(r"EDIT (\d)[: ]", path.read_text())) == set("12345"), path


# --- safe ----------------------------------------------------------------------------------------


def test_keys_come_from_a_secret_that_may_be_absent():
    entries = container()["env"]
    keys = [entry for entry in entries if re.search("KEY|TOKEN$|SECRET|PASSWORD", entry["name"])]
    assert {entry["name"] for entry in keys} == {"WANDB_API_KEY", "HF_TOKEN"}
    for entry in keys:
        assert set(entry) == {"name", "valueFrom"}
        reference = entry["valueFrom"]["secretKeyRef"]
        assert reference.pop("optional") is True
        assert reference == {"name": "megatron-xielu-keys", "key": entry["name"]}
    create = f"kubectl create secret generic {reference['name']} "
    assert create in (FOLDER / "README.md").read_text()


def test_pods_are_not_privileged_and_have_time_to_save():
    _, template = trainjob_spec()
    spec, inner = template["spec"], container()
    assert spec["terminationGracePeriodSeconds"] >= 600
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert inner["securityContext"]["allowPrivilegeEscalation"] is False
    assert inner["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    for amounts in inner["resources"].values():  # free text to the schemas
        assert all(re.fullmatch(r"\d+(Ki|Mi|Gi|Ti|m)?", amount) for amount in amounts.values())
    shm = next(mount["name"] for mount in inner["volumeMounts"] if mount["mountPath"] == "/dev/shm")
    (volume,) = [volume for volume in spec["volumes"] if volume["name"] == shm]
    assert volume["emptyDir"]["medium"] == "Memory"
    claim = documents()["PersistentVolumeClaim"]
    names = [volume.get("persistentVolumeClaim", {}).get("claimName") for volume in spec["volumes"]]
    assert claim["metadata"]["name"] in names
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


# --- true to pretrain.sh -------------------------------------------------------------------------


def start(stand_in: str, tmp_path: Path, **environment: str) -> subprocess.Popen[str]:
    """Run the container's command with ``stand_in`` in the place of pretrain.sh."""
    script = tmp_path / "pretrain.sh"
    script.write_text(f"#!/bin/bash\n{stand_in}\n")
    script.chmod(0o755)
    inner = container()
    (command,) = inner["args"]
    # Kubernetes would replace $(NAME) before the shell sees it.
    assert "$(" not in command and command.count(PRETRAIN) == 1
    return subprocess.Popen(
        [*inner["command"], command.replace(PRETRAIN, str(script))],
        env={"PATH": "/usr/bin:/bin", **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


# What the operator sets on node 3 of 11: torch.go of Kubeflow Trainer 2.3.
INJECTED = {
    "PET_NNODES": "11",
    "PET_NPROC_PER_NODE": "8",
    "PET_NODE_RANK": "3",
    "PET_MASTER_ADDR": "run-node-0-0.run",
    "PET_MASTER_PORT": "29500",
}


def test_the_operators_environment_becomes_the_launchers(tmp_path):
    process = start("/usr/bin/env", tmp_path, **INJECTED)
    output, _ = process.communicate(timeout=60)
    seen = dict(line.split("=", 1) for line in output.splitlines())
    assert seen["NNODES"] == "11" and seen["NODE_RANK"] == "3" and seen["GPUS_PER_NODE"] == "8"
    assert seen["MASTER_ADDR"] == INJECTED["PET_MASTER_ADDR"]
    assert seen["MASTER_PORT"] == INJECTED["PET_MASTER_PORT"]
    assert not [key for key in seen if key.startswith("PET_") or key in ("RANK", "WORLD_SIZE")]


def starts_again(code: int) -> bool:
    """Whether the pod is replaced after its container ended with ``code``."""
    job, template = trainjob_spec()
    assert template["spec"]["restartPolicy"] == "Never"
    for rule in job["podFailurePolicy"]["rules"]:
        exit_codes = rule.get("onExitCodes")
        if exit_codes and exit_codes["operator"] == "In" and code in exit_codes["values"]:
            assert exit_codes["containerName"] == template["spec"]["containers"][0]["name"]
            return rule["action"] != "FailJob"
    return job["backoffLimit"] > 0


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 75, 126, 127, 128, 137, 143])
def test_exit_codes_start_again_or_not(code, tmp_path):
    process = start(f"exit {code}", tmp_path)
    process.communicate(timeout=60)
    if code == 0:
        assert process.returncode == 0
    else:
        assert process.returncode != 0
        assert starts_again(process.returncode) == (code not in (2, 4, 126, 127))


def test_a_stop_on_purpose_does_not_count():
    rules = trainjob_spec()[0]["podFailurePolicy"]["rules"]
    ignored = [rule for rule in rules if rule["action"] == "Ignore"]
    assert [75] in [rule["onExitCodes"]["values"] for rule in ignored if "onExitCodes" in rule]
    conditions = [rule["onPodConditions"] for rule in ignored if "onPodConditions" in rule]
    assert [{"type": "DisruptionTarget", "status": "True"}] in conditions


def test_sigterm_reaches_the_launcher_and_is_waited_for(tmp_path):
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    stand_in = f"""
        trap 'sleep 0.5; touch {saved}; exit 75' TERM
        touch {ready}
        while :; do sleep 0.05; done"""
    process = start(stand_in, tmp_path)
    deadline = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert saved.exists()


def test_exit_codes_are_those_that_the_launcher_documents():
    text = " ".join(help_text().split("Exit codes:")[1].split())
    useless, again = re.fullmatch(
        r"0 finished; (.*) \(starting again is useless\); (.*)", text
    ).groups()  # type: ignore[union-attr]
    assert re.findall(r"\b\d+\b", useless) == ["2", "4"]
    assert re.findall(r"\b\d+\b", again) == ["75"]


def help_text() -> str:
    command = ["bash", str(EXAMPLES / "pretrain.sh"), "--help"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_launcher_knows_every_variable():
    others = {"HF_TOKEN", "MEGATRON_XIELU_NODE"}  # of Hugging Face, and of the event log
    known = set(re.findall(r"\b[A-Z][A-Z0-9_]+\b", help_text())) | others
    assert {entry["name"] for entry in container()["env"]} <= known


def test_the_example_divides_its_batch_and_names_a_network():
    environment = {entry["name"]: entry.get("value", "") for entry in container()["env"]}
    trainer = documents()["TrainJob"]["spec"]["trainer"]
    script = """
        set -eu
        source models/$MODEL.sh
        source network.env.sh
        echo $GLOBAL_BATCH $((GPUS / TP / PP / CP * MICRO_BATCH))"""
    gpus = str(trainer["numNodes"] * trainer["numProcPerNode"])
    output = subprocess.run(
        ["bash", "-c", script],
        env={"PATH": "/usr/bin:/bin", "GPUS": gpus, **environment},
        cwd=EXAMPLES,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    batch, at_once = map(int, output.split())
    assert batch % at_once == 0
