"""The launch files: what they run, and that their numbers agree with each other."""

import importlib
import math
import os
import pathlib
import re
import shlex
import subprocess

import pytest
import yaml

from train.config import freeze

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"


def dry_run(script: str, *arguments: str, **environment: str) -> list[list[str]]:
    """The commands that a script would run, as words."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        [str(LAUNCH / script), "--dry-run", *arguments],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [shell_words(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("script", ["local_gpus.sh", "slurm.sbatch", "tpu_pod.sh"])
def test_a_dry_run_may_be_asked_for_anywhere(script):
    first = ["train"] if script == "tpu_pod.sh" else []
    names = {"TPU": "slice", "ZONE": "zone"}
    expected = dry_run(script, *first, SPACED, **names)
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        [str(LAUNCH / script), *first, SPACED, "--dry-run"],
        env=kept | names,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [shell_words(line) for line in done.stdout.splitlines()] == expected


def shell_words(line: str) -> list[str]:
    """A line as bash splits it: it knows a quoting of its own, $'...', that shlex does not."""
    split = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
    )
    return split.stdout.split("\0")[:-1]


TRAIN = ["-m", "train", "--config=configs/lm_c4.py"]
SPACED = "--config.prompt=My fellow citizens"


def test_local_gpus_runs_one_process():
    (words,) = dry_run("local_gpus.sh", SPACED)
    assert words == [".venv/bin/python", *TRAIN, "--workdir=runs/lm_c4", SPACED]
    (words,) = dry_run("local_gpus.sh", CONFIG="configs/lm_sotu.py", PYTHON="py", WORKDIR="a b")
    assert words == ["py", "-m", "train", "--config=configs/lm_sotu.py", "--workdir=a b"]


def test_slurm_runs_the_training_in_every_task():
    (words,) = dry_run("slurm.sbatch", SPACED)
    train = [".venv/bin/python", *TRAIN, "--workdir=runs/lm_c4", SPACED]
    assert words == ["srun", "--kill-on-bad-exit=1", *train]


def test_slurm_has_a_task_for_each_gpu_as_jax_expects():
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert "gpus-per-task" not in options
    check_fits("configs.lm_c4", int(options["nodes"]) * int(options["gpus-per-node"]))


def check_fits(module: str, devices: int) -> None:
    """The mesh and the batch of a configuration fit a number of devices."""
    config = freeze(importlib.import_module(module).get_config())
    mesh = config.mesh
    assert mesh.data == -1
    assert devices % (mesh.fsdp * mesh.expert * mesh.tensor) == 0
    assert config.batch % (devices // mesh.tensor) == 0


def test_tpu_pod_runs_the_same_on_all_workers():
    (words,) = dry_run("tpu_pod.sh", "train", SPACED, TPU="slice", ZONE="zone")
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice", "--zone=zone", "--worker=all"]
    assert words[:-1] == ssh
    remote = shlex.split(words[-1].removeprefix("--command="))
    assert remote == [
        *("cd", "emoe_jax", "&&", "TFDS_DATA_DIR=/mnt/share/tensorflow_datasets"),
        *(".venv/bin/python", *TRAIN, "--workdir=/mnt/share/runs/lm_c4", SPACED),
    ]


def test_tpu_pod_installs_this_commit_and_mounts_the_share():
    commands = dry_run("tpu_pod.sh", "install", TPU="slice", ZONE="z", SHARE="10.0.0.2:/share")
    assert [words[:2] for words in commands] == [
        ["mkdir", "-p"],
        ["git", "archive"],
        ["gcloud", "compute"],
        ["gcloud", "compute"],
    ]
    script = commands[-1][-1].removeprefix("--command=")
    assert "'.[train,tpu]'" in script
    assert "sudo mount -t nfs '10.0.0.2:/share' /mnt/share" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["train"], {}, "set TPU to the name of the slice"),
        (["train"], {"TPU": "slice"}, "set ZONE to its zone"),
        (["install"], {"TPU": "slice", "ZONE": "zone"}, "set SHARE to HOST:/EXPORT"),
        (["trian"], {"TPU": "slice", "ZONE": "zone"}, "'trian' is none of install, train, stop"),
        ([], {"TPU": "slice", "ZONE": "zone"}, "'' is none of install, train, stop"),
    ],
)
def test_tpu_pod_says_what_is_missing(arguments, environment, words):
    done = subprocess.run(
        [str(LAUNCH / "tpu_pod.sh"), *arguments],
        env={"PATH": os.environ["PATH"]} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert words in done.stderr
    assert done.stdout == ""


def test_the_jobset_has_what_a_jobset_must_have():
    _, jobset = yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", jobset["metadata"]["name"])
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1
    job = replicated["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    assert job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    devices = math.prod(map(int, topology.split("x")))
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5p-slice"
    assert chips == 4  # of a v5p host
    assert job["completions"] * chips == devices
    check_fits("configs.lm_c4", devices)


def test_the_jobset_trains_into_the_folder_that_its_hosts_share():
    claim, jobset = yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text())
    assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,), (volume,) = pod["containers"], pod["volumes"]
    assert container["command"] == ["python", *TRAIN, "--workdir=/share/runs/lm_c4"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    (mount,) = container["volumeMounts"]
    assert mount == {"name": volume["name"], "mountPath": "/share"}
    (variable,) = container["env"]
    assert variable["value"].startswith("/share/")


def test_the_comment_of_the_jobset_replaces_its_image():
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    (sed,) = re.findall(r'sed "s\|(image: [\w-]+)\|', text)
    assert [line.strip() for line in text.splitlines() if line.strip() == sed] == [sed]
