"""The Kubernetes examples: valid for their APIs, equal to each other, and true to pretrain.sh.

No cluster runs here. Core kinds, and the jobs and pods inside the operators' kinds, are checked by
Kubernetes' own schemas, in which an unknown key is an error. The operators' kinds are read into the
classes that they publish and written back: what comes out must be what went in, since these classes
drop unknown keys, fill in missing ones and convert types. The containers' commands run for real,
with a stand-in for pretrain.sh.
"""

from __future__ import annotations

import copy
import json
import re
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
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
    from kubeflow import training
    from kubeflow_trainer_api import models

    api_version, kind = document["apiVersion"], document["kind"]
    if api_version == "trainer.kubeflow.org/v1alpha1":
        if kind == "TrainingRuntime":
            for job in document["spec"]["template"]["spec"]["replicatedJobs"]:
                check({"apiVersion": "batch/v1", "kind": "Job", **job["template"]})
        known = vars(models)[f"TrainerV1alpha1{kind}"]
        assert known.from_dict(copy.deepcopy(document)).to_dict() == document
    elif api_version == "kubeflow.org/v1" and kind == "PyTorchJob":
        for replica in document["spec"]["pytorchReplicaSpecs"].values():
            check({"apiVersion": "v1", "kind": "Pod", **replica["template"]})
        client = training.ApiClient()
        response = SimpleNamespace(data=json.dumps(document))
        job = client.deserialize(response, "KubeflowOrgV1PyTorchJob")
        assert client.sanitize_for_serialization(job) == document
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


def replicas() -> dict[str, Any]:
    return documents()["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]


def container(name: str) -> dict[str, Any]:
    template = trainjob_spec()[1] if name == "TrainJob" else replicas()["Master"]["template"]
    (container,) = template["spec"]["containers"]
    return container


# --- valid ---------------------------------------------------------------------------------------


def test_the_kinds_are_those_that_are_meant():
    kinds = {"TrainingRuntime", "TrainJob", "PyTorchJob", "PersistentVolumeClaim"}
    assert set(documents()) == kinds


@pytest.mark.parametrize("kind", documents())
def test_manifest_is_valid(kind):
    check(documents()[kind])


JOB = "spec template spec replicatedJobs 0 template spec"
POD = f"{JOB} template spec"
MASTER = "spec pytorchReplicaSpecs Master"


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
        ("PyTorchJob", "spec nprocPerNode", "rename"),
        ("PyTorchJob", "spec runPolicy cleanPodPolicy", "rename"),
        ("PyTorchJob", f"{MASTER} restartPolicy", "rename"),
        ("PyTorchJob", f"{MASTER} template spec volumes 0 persistentVolumeClaim", "rename"),
        ("PersistentVolumeClaim", "spec accessModes", "rename"),
        # A value of another type.
        ("TrainJob", "spec trainer numNodes", "two"),
        ("TrainJob", "spec trainer env 0 value", 1),
        ("TrainingRuntime", f"{JOB} podFailurePolicy rules 0 onExitCodes values 0", "2"),
        ("TrainingRuntime", f"{POD} terminationGracePeriodSeconds", "600"),
        ("TrainingRuntime", f"{POD} securityContext runAsNonRoot", "yes"),
        ("PyTorchJob", "spec nprocPerNode", 8),
        ("PyTorchJob", f"{MASTER} replicas", "1"),
        ("PyTorchJob", f"{MASTER} template spec containers 0 command", "/bin/bash"),
        ("PersistentVolumeClaim", "spec accessModes", "ReadWriteMany"),
        # A field that is missing.
        ("TrainJob", "spec runtimeRef", "delete"),
        ("TrainJob", "spec runtimeRef name", "delete"),
        ("TrainingRuntime", f"{JOB} podFailurePolicy rules 0 action", "delete"),
        ("TrainingRuntime", f"{POD} containers", "delete"),
        ("PyTorchJob", "spec pytorchReplicaSpecs", "delete"),
        ("PyTorchJob", f"{MASTER} template spec containers 0 name", "delete"),
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


def test_what_the_operators_refuse_beyond_their_schemas():
    # trainingruntime_webhook.go: the labelled job is single and has a container of this name.
    (replicated,) = documents()["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]
    labels = replicated["template"]["metadata"]["labels"]
    assert labels["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    assert replicated.get("replicas", 1) == 1
    assert container("TrainJob")["name"] == "node"
    # torch.go injects into the container only where there is a trainer, which may set no PET_*.
    job = documents()["TrainJob"]["spec"]
    assert not [entry for entry in job["trainer"]["env"] if entry["name"].startswith("PET_")]
    runtime = documents()["TrainingRuntime"]
    assert job["runtimeRef"]["kind"] == runtime["kind"]
    assert job["runtimeRef"]["name"] == runtime["metadata"]["name"]
    # pytorchjob_webhook.go
    assert replicas()["Master"]["replicas"] == 1
    assert container("PyTorchJob")["name"] == "pytorch"


# --- equal ---------------------------------------------------------------------------------------


def test_both_make_the_same_pods():
    _, ours = trainjob_spec()
    # The operator sets its own, and warns about another one.
    assert ours["spec"].pop("restartPolicy") == "Never"
    assert replicas()["Worker"]["template"] == replicas()["Master"]["template"]
    theirs = replicas()["Master"]["template"]
    commands = []
    for template in (ours, theirs):
        (inner,) = template["spec"]["containers"]
        inner["env"] = {entry["name"]: entry for entry in inner["env"]}
        (command,) = inner.pop("args")
        commands.append(command.partition(PRETRAIN)[0].removesuffix("exec "))
        inner.pop("name")
    assert commands[0] == commands[1]
    assert ours == theirs


def test_both_start_the_same_nodes():
    trainer, job = documents()["TrainJob"]["spec"]["trainer"], documents()["PyTorchJob"]["spec"]
    assert trainer["numNodes"] == sum(replica["replicas"] for replica in replicas().values())
    assert str(trainer["numProcPerNode"]) == job["nprocPerNode"]
    assert container("PyTorchJob")["resources"]["limits"]["nvidia.com/gpu"] == job["nprocPerNode"]


def test_the_five_places_to_edit_are_marked():
    for path in FOLDER.glob("*.yaml"):
        assert set(re.findall(r"EDIT (\d)[: ]", path.read_text())) == set("12345"), path


# --- safe ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["TrainJob", "PyTorchJob"])
def test_keys_come_from_a_secret_that_may_be_absent(name):
    entries = container(name)["env"]
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
    spec, inner = template["spec"], container("TrainJob")
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


def start(name: str, stand_in: str, tmp_path: Path, **environment: str) -> subprocess.Popen[str]:
    """Run the container's command with ``stand_in`` in the place of pretrain.sh."""
    script = tmp_path / "pretrain.sh"
    script.write_text(f"#!/bin/bash\n{stand_in}\n")
    script.chmod(0o755)
    inner = container(name)
    (command,) = inner["args"]
    # Kubernetes would replace $(NAME) before the shell sees it.
    assert "$(" not in command and command.count(PRETRAIN) == 1
    return subprocess.Popen(
        [*inner["command"], command.replace(PRETRAIN, str(script))],
        env={"PATH": "/usr/bin:/bin", **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


# What the operators set on node 3 of 11: torch.go of Kubeflow Trainer 2.3; envvar.go and master.go
# of the training operator 1.9.
INJECTED = {
    "TrainJob": {
        "PET_NNODES": "11",
        "PET_NPROC_PER_NODE": "8",
        "PET_NODE_RANK": "3",
        "PET_MASTER_ADDR": "run-node-0-0.run",
        "PET_MASTER_PORT": "29500",
    },
    "PyTorchJob": {
        "PYTHONUNBUFFERED": "1",
        "MASTER_PORT": "23456",
        "PET_MASTER_PORT": "23456",
        "MASTER_ADDR": "run-master-0",
        "PET_MASTER_ADDR": "run-master-0",
        "WORLD_SIZE": "88",
        "RANK": "3",
        "PET_NODE_RANK": "3",
        "PET_NPROC_PER_NODE": "8",
        "PET_NNODES": "11",
    },
}


@pytest.mark.parametrize("name", INJECTED)
def test_the_operators_environment_becomes_the_launchers(name, tmp_path):
    injected = INJECTED[name]
    process = start(name, "/usr/bin/env", tmp_path, **injected)
    output, _ = process.communicate(timeout=60)
    seen = dict(line.split("=", 1) for line in output.splitlines())
    assert seen["NNODES"] == "11" and seen["NODE_RANK"] == "3" and seen["GPUS_PER_NODE"] == "8"
    assert seen["MASTER_ADDR"] == injected["PET_MASTER_ADDR"]
    assert seen["MASTER_PORT"] == injected["PET_MASTER_PORT"]
    assert not [key for key in seen if key.startswith("PET_") or key in ("RANK", "WORLD_SIZE")]


def starts_again(name: str, code: int) -> bool:
    """Whether the pod is replaced after its container ended with ``code``."""
    if name == "PyTorchJob":
        # IsRetryableExitCode in train_util.go
        assert {replica["restartPolicy"] for replica in replicas().values()} == {"ExitCode"}
        return code >= 128
    job, template = trainjob_spec()
    assert template["spec"]["restartPolicy"] == "Never"
    for rule in job["podFailurePolicy"]["rules"]:
        exit_codes = rule.get("onExitCodes")
        if exit_codes and exit_codes["operator"] == "In" and code in exit_codes["values"]:
            assert exit_codes["containerName"] == template["spec"]["containers"][0]["name"]
            return rule["action"] != "FailJob"
    return job["backoffLimit"] > 0


@pytest.mark.parametrize("name", INJECTED)
@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 75, 126, 127, 128, 137, 143])
def test_exit_codes_start_again_or_not(name, code, tmp_path):
    process = start(name, f"exit {code}", tmp_path)
    process.communicate(timeout=60)
    if code == 0:
        assert process.returncode == 0
    else:
        assert process.returncode != 0
        assert starts_again(name, process.returncode) == (code not in (2, 4, 126, 127))


def test_a_stop_on_purpose_does_not_count():
    rules = trainjob_spec()[0]["podFailurePolicy"]["rules"]
    ignored = [rule for rule in rules if rule["action"] == "Ignore"]
    assert [75] in [rule["onExitCodes"]["values"] for rule in ignored if "onExitCodes" in rule]
    conditions = [rule["onPodConditions"] for rule in ignored if "onPodConditions" in rule]
    assert [{"type": "DisruptionTarget", "status": "True"}] in conditions


@pytest.mark.parametrize(("name", "code"), [("TrainJob", 75), ("PyTorchJob", 75 + 128)])
def test_sigterm_reaches_the_launcher_and_is_waited_for(name, code, tmp_path):
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    stand_in = f"""
        trap 'sleep 0.5; touch {saved}; exit 75' TERM
        touch {ready}
        while :; do sleep 0.05; done"""
    process = start(name, stand_in, tmp_path)
    deadline = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == code
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


@pytest.mark.parametrize("name", INJECTED)
def test_the_launcher_knows_every_variable(name):
    others = {"HF_TOKEN", "MEGATRON_XIELU_NODE"}  # of Hugging Face, and of the event log
    known = set(re.findall(r"\b[A-Z][A-Z0-9_]+\b", help_text())) | others
    assert {entry["name"] for entry in container(name)["env"]} <= known


def test_the_example_divides_its_batch_and_names_a_network():
    environment = {entry["name"]: entry.get("value", "") for entry in container("TrainJob")["env"]}
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
