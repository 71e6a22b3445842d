"""Every file of cluster/ through the program that will read it: Ray's cluster launcher, the clouds' own API models, KubeRay's autoscaler, Docker's linter."""

import copy
import json
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from modip_ray.cli import parser
from modip_ray.config import load
from modip_ray.jobs.client import GRACE_S

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


# ---- the cluster launcher's files --------------------------------------------------------------------------------------------------------------


def launcher_config(name: str) -> dict:
    """As `ray up` reads it: with the provider's defaults, and Ray's schema and rules passed."""
    from ray.autoscaler._private.util import prepare_config, validate_config
    config = prepare_config(documents(name)[0])
    validate_config(config)
    return config


@pytest.fixture(params=["aws.yaml", "gcp.yaml"])
def launched(request) -> dict:
    return launcher_config(request.param)


def test_ray_refuses_what_its_schema_does_not_know():
    from ray.autoscaler._private.util import prepare_config, validate_config
    config = documents("aws.yaml")[0] | {"max_worker": 3}
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config(config))
    config = documents("aws.yaml")[0] | {"max_workers": 0}
    with pytest.raises(ValueError, match="max_workers"):
        validate_config(prepare_config(config))


def test_the_launched_cluster_is_closed_but_for_ssh(launched):
    if launched["provider"]["type"] == "aws":
        rules = launched["provider"]["security_group"]["IpPermissions"]
        assert [(rule["FromPort"], rule["ToPort"]) for rule in rules] == [(22, 22)]
    started = {"head": launched["head_start_ray_commands"][-1], "worker": launched["worker_start_ray_commands"][-1]}
    assert all("RAY_AUTH_MODE=token" in command for command in started.values())
    assert "--dashboard-host=127.0.0.1" in started["head"] and "autoscaling-config" in started["head"]
    assert "/home/ubuntu/.ray/auth_token" in launched["file_mounts"] and "chmod 600 ~/.ray/auth_token" in launched["setup_commands"]


def test_what_is_mounted_and_installed_is_there(launched):
    sources = [source for source in launched["file_mounts"].values() if not source.startswith("~")]
    assert sources and all((ROOT / source).is_file() for source in sources)
    for command in [*launched["setup_commands"], *launched["head_setup_commands"], *launched["worker_setup_commands"]]:
        assert subprocess.run(["bash", "-n", "-c", command], capture_output=True).returncode == 0, command
        for file in re.findall(r"-r ~/(\S+)", command):
            assert f"/home/ubuntu/{file}" in launched["file_mounts"]


def test_every_aws_machine_is_a_valid_call_of_run_instances():
    """Ray hands node_config to EC2's RunInstances; botocore has the model of that call and needs no network for it."""
    import botocore.session
    from botocore.validate import ParamValidator
    session = botocore.session.get_session()
    call = session.get_service_model("ec2").operation_model("RunInstances").input_shape
    for kind, node in launcher_config("aws.yaml")["available_node_types"].items():
        asked = node["node_config"] | {"MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(asked, call)
        assert not report.has_errors(), (kind, report.generate_report())
        assert set(asked) <= set(call.members)
    spot = launcher_config("aws.yaml")["available_node_types"]
    assert spot["rollout"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot" and "InstanceMarketOptions" not in spot["head"]["node_config"]
    assert ParamValidator().validate({"MinCount": 1, "MaxCount": "1"}, call).has_errors()


def test_every_gcp_machine_is_a_valid_instance():
    """The client library for Compute Engine ships the API's own description."""
    import googleapiclient.discovery_cache
    schemas = json.loads((Path(googleapiclient.discovery_cache.__file__).parent / "documents" / "compute.v1.json").read_text())["schemas"]
    types = launcher_config("gcp.yaml")["available_node_types"]
    for node in types.values():
        check_discovery(node["node_config"], {"$ref": "Instance"}, schemas, "node_config")
    assert types["rollout"]["node_config"]["scheduling"]["preemptible"] is True
    with pytest.raises(AssertionError, match="preemptable"):
        check_discovery({"scheduling": {"preemptable": True}}, {"$ref": "Instance"}, schemas, "node_config")


def check_discovery(value, schema: dict, schemas: dict, where: str) -> None:
    """A value against Google's discovery format: known names, and plain types."""
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    kinds = {"object": dict, "array": list, "string": (str, int), "integer": int, "boolean": bool, "number": (int, float)}
    assert isinstance(value, kinds[schema["type"]]), f"{where}: {value!r} is no {schema['type']}"
    if isinstance(value, dict):
        for key, item in value.items():
            assert key in schema["properties"], f"{where}.{key}: unknown"
            check_discovery(item, schema["properties"][key], schemas, f"{where}.{key}")
    elif isinstance(value, list):
        for item in value:
            check_discovery(item, schema["items"], schemas, f"{where}[]")


# ---- KubeRay -----------------------------------------------------------------------------------------------------------------------------------

# Names and types of the KubeRay 1.7 custom resources' fields (ray.io/v1), as far as these files could use them.
SPEC = {"authOptions": dict, "autoscalerOptions": dict, "enableInTreeAutoscaling": bool, "gcsFaultToleranceOptions": dict, "headGroupSpec": dict,
        "headServiceAnnotations": dict, "managedBy": str, "rayVersion": str, "suspend": bool, "upgradeStrategy": dict, "workerGroupSpecs": list}
HEAD = {"enableIngress": bool, "headService": dict, "labels": dict, "rayStartParams": dict, "resources": dict, "serviceType": str, "template": dict}
GROUP = {"groupName": str, "idleTimeoutSeconds": int, "labels": dict, "maxReplicas": int, "minReplicas": int, "numOfHosts": int, "priority": int,
         "rayStartParams": dict, "replicas": int, "resources": dict, "scaleStrategy": dict, "suspend": bool, "template": dict}
AUTOSCALER = {"env": list, "envFrom": list, "idleTimeoutSeconds": int, "image": str, "resources": dict, "upscalingMode": str, "version": str}
JOB = {"activeDeadlineSeconds": int, "backoffLimit": int, "entrypoint": str, "entrypointNumCpus": (int, float), "entrypointResources": str, "jobId": str,
       "metadata": dict, "rayClusterSpec": dict, "runtimeEnvYAML": str, "shutdownAfterJobFinishes": bool, "submissionMode": str,
       "submitterPodTemplate": dict, "suspend": bool, "ttlSecondsAfterFinished": int}


def fits(value: dict, fields: dict) -> None:
    for key, item in value.items():
        assert key in fields, f"{key}: no field of KubeRay"
        assert isinstance(item, fields[key]), f"{key}: got {item!r}"


def cluster_spec(name: str) -> dict:
    spec = documents(name)[0]["spec"]
    return spec["rayClusterSpec"] if "rayClusterSpec" in spec else spec


def kuberay_config(name: str) -> dict:
    """What Ray's own autoscaler in the head pod derives from the custom resource; it validates the result."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    return _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "modip", "namespace": "default"}, "spec": copy.deepcopy(cluster_spec(name))})


@pytest.mark.parametrize("name", ["kuberay-cluster.yaml", "kuberay-job.yaml"])
def test_kuberay_resources_have_only_known_fields_and_valid_pods(name):
    import kubernetes_validate
    first, *others = documents(name)
    assert (first["apiVersion"], first["kind"]) == ("ray.io/v1", "RayCluster" if "cluster" in name else "RayJob")
    spec = cluster_spec(name)
    if first["kind"] == "RayJob":
        fits(first["spec"], JOB)
        assert yaml.safe_load(first["spec"]["runtimeEnvYAML"])["env_vars"].keys() == {"RAY_JOB_STOP_WAIT_TIME_S"}
    fits(spec, SPEC)
    fits(spec["headGroupSpec"], HEAD)
    fits(spec["autoscalerOptions"], AUTOSCALER)
    assert spec["authOptions"] == {"mode": "token"} and spec["rayVersion"] == pinned("requirements.txt")["ray"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups[1:]:
        fits(group, GROUP)
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in groups:
        assert all(isinstance(v, str) for v in group["rayStartParams"].values())
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
        mistaken = copy.deepcopy(pod)
        mistaken["spec"]["containers"][0]["resource"] = {}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(mistaken, kubernetes_validate.latest_version(), strict=True)
    assert others == [], "what keeps the runs is not deleted with the file"
    (volume,) = documents("kuberay-volume.yaml")
    kubernetes_validate.validate(volume, kubernetes_validate.latest_version(), strict=True)
    claims = {v["persistentVolumeClaim"]["claimName"] for v in spec["headGroupSpec"]["template"]["spec"]["volumes"]}
    assert claims == {volume["metadata"]["name"]} and volume["kind"] == "PersistentVolumeClaim"


def test_the_job_runs_on_the_cluster_of_the_other_file_and_its_command_is_one():
    assert cluster_spec("kuberay-job.yaml") == cluster_spec("kuberay-cluster.yaml")
    words = shlex.split(documents("kuberay-job.yaml")[0]["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "modip_ray"]
    args = parser().parse_args(words[3:])
    cfg = load(args.config, args.settings)
    mounts = cluster_spec("kuberay-job.yaml")["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert cfg.resources.ray_address == "auto" and cfg.run_dir.startswith(mounts[0]["mountPath"] + "/")


@pytest.mark.parametrize("config", ["cluster", "cluster/gpu"])
def test_a_run_on_a_cluster_uses_the_time_for_a_checkpoint_that_it_is_given_and_no_more(config):
    """A run gives itself up after log.grace_s: long before it would be killed the checkpoint would be lost for nothing, after that it is cut off."""
    environment = yaml.safe_load(documents("kuberay-job.yaml")[0]["spec"]["runtimeEnvYAML"])["env_vars"]
    assert float(environment["RAY_JOB_STOP_WAIT_TIME_S"]) == GRACE_S < cluster_spec("kuberay-job.yaml")["headGroupSpec"]["template"]["spec"][
        "terminationGracePeriodSeconds"]
    assert 0.8 * GRACE_S < load(config).log.grace_s < GRACE_S


# ---- the roles have a place --------------------------------------------------------------------------------------------------------------------


def node_types(name: str) -> tuple[dict, list[tuple[dict, int, int]]]:
    """Resources of the head, and of each worker type with its least and greatest number."""
    config = kuberay_config(name) if name.startswith("kuberay") else launcher_config(name)
    types = dict(config["available_node_types"])
    return types.pop(config["head_node_type"])["resources"], [(t["resources"], t["min_workers"], t["max_workers"]) for t in types.values()]


@pytest.mark.parametrize(("name", "config"), [("local", "cluster"), *((name, config) for name in ("aws.yaml", "gcp.yaml", "kuberay-cluster.yaml")
                                                                      for config in ("cluster", "cluster/gpu"))])
def test_every_role_has_a_node_by_its_resources(name, config):
    """With all the nodes that a file allows there is room for the least number of workers, trainers go to the head only, environments never do."""
    from modip_ray.actors.placement import bundle, demands, missing
    from tests.cluster.test_local import HEAD as local_head
    from tests.cluster.test_local import WORKER as local_worker
    head, workers = (local_head, [(local_worker, 1, 4)]) if name == "local" else node_types(name)
    cfg = load(config, ["task=halfcheetah-medium"])
    nodes = {"head": head} | {f"{k}-{i}": resources for k, (resources, _, most) in enumerate(workers) for i in range(most)}
    assert missing(demands(cfg), nodes) == []
    for role in ("planner", "learner", "replay", "store", "evaluator", "rollout"):
        places = {node.split("-")[0] for node, has in nodes.items() if all(has.get(k, 0) >= v for k, v in bundle(cfg, role).items())}
        assert places == ({"head"} if role != "rollout" else {str(k) for k in range(len(workers))}), role
    lacking = {"head": {k: v for k, v in head.items() if k != "trainer"}}
    assert any("trainer" in line for line in missing(demands(cfg), lacking))


# ---- what is installed -------------------------------------------------------------------------------------------------------------------------


def pinned(name: str) -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    found = [re.fullmatch(r"([A-Za-z0-9_-]+)(?:\[[\w,]+\])?(?:==(\S+)|<\S+)?", line) for line in lines if line]
    assert all(found), name
    return {m[1]: m[2] for m in found}


def test_worker_nodes_have_the_pins_of_the_head():
    everywhere, workers = pinned("requirements.txt"), pinned("cluster/requirements-worker.txt")
    assert {name: everywhere.get(name, "missing") for name in workers} == workers


def test_what_a_rollout_worker_imports_is_installed_on_worker_nodes():
    """The modules that it really loads, by the packages they come from; those of requirements-worker.txt and what they require."""
    code = ("import sys, json, modip_ray.actors.rollout, modip_ray.tasks.envs; from importlib import metadata; owners = metadata.packages_distributions(); "
            "print(json.dumps(sorted({d for m in sys.modules for d in owners.get(m.split('.')[0], [])})))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    loaded = {normal(name) for name in json.loads(done.stdout)} - {"modip-ray", "setuptools", "psutil", "uvloop", "pysocks"}   # its own psutil; others if there
    assert "ray" in loaded and "torch" not in loaded
    assert loaded <= closure(pinned("cluster/requirements-worker.txt")), loaded - closure(pinned("cluster/requirements-worker.txt"))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(names) -> set[str]:
    """Distributions and all that they may require (extras included), as installed here."""
    found, todo = set(), [normal(name) for name in names]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        extras = {"ray": "default", "gymnasium": "mujoco"}.get(name)
        todo += [normal(re.match(r"[\w.-]+", r)[0]) for r in required if "extra ==" not in r or extras and f'"{extras}"' in r.replace("'", '"')]
    return found


def test_the_dockerfile_passes_hadolint_and_copies_what_exists():
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([str(hadolint), str(CLUSTER / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (CLUSTER / "Dockerfile").read_text()
    copied = [source for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for source in line.split()[:-1]]
    assert copied and all((ROOT / source).exists() for source in copied)
    broken = subprocess.run([str(hadolint), "-"], input=text.replace("WORKDIR /opt/modip", "WORKDIRS /opt/modip"), capture_output=True, text=True, timeout=60)
    assert broken.returncode != 0
    images = {c["image"] for name in ("kuberay-cluster.yaml", "kuberay-job.yaml") for g in (cluster_spec(name)["headGroupSpec"],
              *cluster_spec(name)["workerGroupSpecs"]) for c in g["template"]["spec"]["containers"]}
    assert images == {f"modip-ray:{stage}" for stage in re.findall(r"^FROM base AS (\w+)$", text, re.MULTILINE)}
    for words in map(json.loads, re.findall(r"^CMD (\[.+\])$", text, re.MULTILINE)):
        assert subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, timeout=60, cwd=ROOT).stdout.startswith("modip_ray ")
