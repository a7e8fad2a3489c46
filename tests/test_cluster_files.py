"""The files for clusters under examples/: as far as they can be checked without the services that read them."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer.main
import yaml

FOLDER = Path(__file__).parent.parent / "examples" / "cluster"
SLURM = FOLDER / "slurm.sh"

# KubeRay's ray.io/v1, as much of it as a study needs: what a manifest may say, and what it must.
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[KMGT]i?)?$"}
NAMED = {"type": "object", "required": ["name"]}
CONTAINER = {
    "type": "object",
    "required": ["name", "image"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "image": {"type": "string"},
        "ports": {"type": "array", "items": {**NAMED, "required": ["containerPort"]}},
        "env": {
            "type": "array",
            "items": {
                **NAMED,
                "additionalProperties": False,
                "properties": {
                    "name": {"type": "string"},
                    "value": {"type": "string"},
                    "valueFrom": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {"secretKeyRef": {**NAMED, "required": ["name", "key"]}},
                    },
                },
            },
        },
        "resources": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                kind: {"type": "object", "additionalProperties": QUANTITY} for kind in ("requests", "limits")
            },
        },
        "volumeMounts": {"type": "array", "items": {**NAMED, "required": ["name", "mountPath"]}},
    },
}
POD = {
    "type": "object",
    "required": ["spec"],
    "additionalProperties": False,
    "properties": {
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "required": ["containers"],
            "additionalProperties": False,
            "properties": {
                "containers": {"type": "array", "minItems": 1, "items": CONTAINER},
                "volumes": {"type": "array", "items": NAMED},
            },
        },
    },
}
GROUP = {"rayStartParams": TEXTS, "template": POD}
CLUSTER = {
    "type": "object",
    "required": ["headGroupSpec"],
    "additionalProperties": False,
    "properties": {
        "rayVersion": {"type": "string"},
        "enableInTreeAutoscaling": {"type": "boolean"},
        "authOptions": {"type": "object", "properties": {"mode": {"enum": ["token", "disabled"]}}},
        "headGroupSpec": {
            "type": "object",
            "required": ["rayStartParams", "template"],
            "additionalProperties": False,
            "properties": {**GROUP, "serviceType": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]}},
        },
        "workerGroupSpecs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"],
                "additionalProperties": False,
                "properties": {
                    **GROUP,
                    "groupName": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
                    "replicas": COUNT,
                    "minReplicas": COUNT,
                    "maxReplicas": COUNT,
                    "numOfHosts": COUNT,
                },
            },
        },
    },
}
RAY_JOB = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": {**NAMED, "properties": {"name": {"type": "string", "pattern": "^[a-z0-9][-a-z0-9]{0,46}$"}}},
        "spec": {
            "type": "object",
            "required": ["entrypoint", "rayClusterSpec"],
            "additionalProperties": False,
            "properties": {
                "entrypoint": {"type": "string"},
                "backoffLimit": COUNT,
                "shutdownAfterJobFinishes": {"type": "boolean"},
                "ttlSecondsAfterFinished": COUNT,
                "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
                "runtimeEnvYAML": {"type": "string"},
                "rayClusterSpec": CLUSTER,
            },
        },
    },
}


@pytest.fixture
def job() -> Any:
    return yaml.safe_load((FOLDER / "kuberay.yaml").read_text())


@pytest.fixture
def launcher() -> Any:
    return yaml.safe_load((FOLDER / "ray-cluster.yaml").read_text())


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """Options of each command of ours."""
    import cli

    group = typer.main.get_command(cli.app)
    commands = group.commands  # type: ignore[attr-defined]
    return {name: {opt for p in command.params for opt in p.opts} for name, command in commands.items()}


def pinned(package: str) -> str:
    """The version that is tested."""
    text = (FOLDER.parent.parent / "constraints.txt").read_text()
    (version,) = re.findall(rf"^{package}==(\S+)$", text, re.MULTILINE)
    return str(version)


def check_commands(text: str, known: dict[str, set[str]]) -> list[str]:
    """Every use of ``longrope`` in a script is of a command there is, with options it has; the commands used."""
    used = []
    for words in re.findall(r"\blongrope ((?:studies show|launch|resume)[^;&>\n]*)", text):
        command, *rest = words.split()
        if command in ("launch", "resume"):
            options = {word for word in rest if word.startswith("--")}
            assert options <= known[command], (command, options - known[command])
        used.append(command)
    return used


class TestKubeRay:
    def test_the_manifest(self, job: Any) -> None:
        jsonschema.validate(job, RAY_JOB)
        assert job["spec"]["rayClusterSpec"]["rayVersion"] == pinned("ray")

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda job: job["spec"].update(entryPoint="misspelt"),
            lambda job: job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].pop("maxReplicas"),
            lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
            lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0].pop(
                "image"
            ),
            lambda job: job["spec"]["rayClusterSpec"]["authOptions"].update(mode="password"),
        ],
    )
    def test_the_check_sees_mistakes(self, job: Any, spoil: Callable[[Any], object]) -> None:
        broken = copy.deepcopy(job)
        spoil(broken)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, RAY_JOB)

    def test_it_hangs_together(self, job: Any, known: dict[str, set[str]]) -> None:
        """Mounts name volumes; requests are the limits; the head has no room for workers; the token is on."""
        cluster = job["spec"]["rayClusterSpec"]
        head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
        for group in (head, *workers):
            pod = group["template"]["spec"]
            volumes = {volume["name"] for volume in pod["volumes"]}
            for container in pod["containers"]:
                assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
                assert container["resources"]["requests"] == container["resources"]["limits"]
        assert head["rayStartParams"]["num-cpus"] == "0"
        assert cluster["authOptions"]["mode"] == "token"
        for group in workers:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
            (container,) = group["template"]["spec"]["containers"]
            assert "LONGROPE_STORAGE" not in {variable["name"] for variable in container["env"]}
        shell = shlex.split(job["spec"]["entrypoint"])
        assert shell[:2] == ["bash", "-c"]
        subprocess.run(["bash", "-n", "-c", shell[2]], check=True)
        assert check_commands(shell[2], known) == ["studies", "resume", "launch"]


class TestLauncher:
    def test_ray_s_own_schema_and_defaults(self, launcher: Any) -> None:
        from ray.autoscaler._private.util import prepare_config, validate_config

        whole = prepare_config(launcher)
        validate_config(whole)
        types = whole["available_node_types"]
        assert sum(kind["min_workers"] for kind in types.values()) == len(launcher["provider"]["worker_ips"])
        with pytest.raises(jsonschema.ValidationError):
            validate_config({**whole, "setup_comands": []})

    def test_versions_and_commands(self, launcher: Any) -> None:
        text = " ".join(launcher["setup_commands"])
        for package in ("ray", "torch", "transformers"):
            assert f" {package}=={pinned(package)} " in f"{text} "
        commands = [*launcher["head_start_ray_commands"], *launcher["worker_start_ray_commands"]]
        for command in [*commands, *launcher["setup_commands"], *launcher["head_setup_commands"]]:
            subprocess.run(["bash", "-n", "-c", command], check=True)
        starts = [command for command in commands if "ray start" in command]
        assert len(starts) == 2
        check_ray_start("\n".join(starts))
        assert all("RAY_AUTH_MODE=token" in start for start in starts)


def check_ray_start(text: str) -> None:
    """Options of ``ray start`` that the installed Ray has."""
    from ray.scripts.scripts import start

    options = {option for parameter in start.params for option in parameter.opts}
    used = {
        word.partition("=")[0]
        for line in re.findall(r"ray start ([^\n]*)", text.replace("\\\n", " "))
        for word in line.split()
        if word.startswith("--")
    }
    assert len(used) > 3
    assert used <= options


class TestSlurm:
    def test_the_shell_and_shellcheck_find_nothing(self) -> None:
        subprocess.run(["bash", "-n", SLURM], check=True)
        shellcheck = Path(sys.executable).with_name("shellcheck")
        found = subprocess.run([shellcheck, "--format=json", SLURM], capture_output=True, text=True, check=False)
        assert json.loads(found.stdout) == []

    def test_what_it_asks_for(self, known: dict[str, set[str]]) -> None:
        text = SLURM.read_text()
        header, _, script = text.partition("set -euo pipefail")
        asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", header, re.MULTILINE))
        assert {"nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "time", "requeue"} <= asked.keys()
        assert len(asked) == header.count("#SBATCH")
        assert "#SBATCH" not in script  # Slurm reads none after the first command
        check_ray_start(script)
        assert check_commands(script, known) == ["studies", "resume", "launch"]
        launch = re.search(r"^LAUNCH=\((.*)\)$", text, re.MULTILINE)
        assert launch is not None
        assert {word for word in shlex.split(launch[1]) if word.startswith("--")} <= known["launch"]


STAND_INS = {
    "scontrol": 'case $1 in show) printf "n1\\nn2\\nn3\\n";; *) echo "scontrol $*" >> "$LOG";; esac',
    "srun": """
node=; while [[ $1 == --* ]]; do [[ $1 == --nodelist=* ]] && node=${1#*=}; shift; done
[[ $1 == hostname ]] && { echo "10.0.0.1 fe80::1"; exit; }
echo "$node: $* mode=$RAY_AUTH_MODE token=${#RAY_AUTH_TOKEN}" >> "$LOG"
""",
    "python": 'if [[ $1 == -c ]]; then echo "$(printf "%064d" 0)"; else cat > /dev/null; echo 3; fi',
    "longrope": """
case $1 in
    studies) [[ -e $KNOWN ]];;
    *) echo "longrope $*" >> "$LOG"; trap 'echo stopped >> "$LOG"; exit 130' TERM; sleep "$LASTS" & wait;;
esac
""",
}


@pytest.fixture
def slurm(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """The script as Slurm would start it, with programs in the place of Slurm's, Ray's and ours that write a log."""
    programs = tmp_path / "longrope" / "bin"
    programs.mkdir(parents=True)
    for name, body in STAND_INS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (programs / name).chmod(0o755)

    def started(lasts: float = 0) -> subprocess.Popen[str]:
        environment = {
            "HOME": str(tmp_path),
            "PATH": os.environ["PATH"],
            "LOG": str(tmp_path / "log"),
            "KNOWN": str(tmp_path / "known"),
            "LASTS": str(lasts),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-3]",
            "SLURM_CPUS_PER_TASK": "8",
            "SLURM_GPUS_ON_NODE": "4",
        }
        return subprocess.Popen(["bash", SLURM], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)

    return started


class TestSlurmScript:
    def test_it_starts_a_study_and_goes_on_with_it(self, slurm: Callable[..., Any], tmp_path: Path) -> None:
        first = slurm()
        assert first.wait(60) == 0, first.stderr.read()
        lines = (tmp_path / "log").read_text().splitlines()
        rays = sorted(line for line in lines if "ray start" in line)
        assert [line[:2] for line in rays] == ["n1", "n2", "n3"]
        assert "--head" in rays[0]
        assert all("--address=10.0.0.1:20007" in line for line in rays[1:])
        assert all("--num-gpus=4" in line and line.endswith("mode=token token=64") for line in rays)
        (launch,) = [line for line in lines if line.startswith("longrope")]
        assert launch.startswith("longrope launch --study my-study --ray-address 10.0.0.1:20007 --model ")
        (tmp_path / "known").touch()
        assert slurm().wait(60) == 0
        assert "longrope resume my-study --ray-address 10.0.0.1:20007" in (tmp_path / "log").read_text()

    def test_out_of_time(self, slurm: Callable[..., Any], tmp_path: Path) -> None:
        """The driver is stopped, and waited for, before the job is queued again."""
        job = slurm(lasts=60)
        deadline = time.monotonic() + 60
        while not (tmp_path / "log").exists() or "longrope launch" not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.2)
        job.send_signal(signal.SIGTERM)
        assert job.wait(60) == 0
        assert (tmp_path / "log").read_text().splitlines()[-2:] == ["stopped", "scontrol requeue 7"]
