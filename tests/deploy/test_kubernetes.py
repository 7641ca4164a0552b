"""The Helm chart and the manifests made from it, by the tools that read them. Needs helm.

Objects of Kubernetes are checked with the schemas of its last three versions, those of the Prometheus Operator and KEDA
with the schemas in crds/, which were made from their CRDs.
"""

import json
import os
import subprocess
import sys
from math import ceil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from poller.app import _FIXED
from poller.config import CONFIG
from poller.server.app import _ALWAYS_OPEN

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "kubernetes" / "chart"
VERSIONS = ("1.35", "1.36", "1.37")
CRDS = Path(__file__).parent / "crds"
EXAMPLES = DEPLOY / "kubernetes" / "examples"
FLEET = {"config": {"store": "dynamodb://poller"}}
MAPPING = {
    "EventSourceArn": "arn:aws:sqs:eu-west-1:123456789012:orders",
    "FunctionName": "orders",
    "FilterCriteria": {"Filters": [{"Pattern": '{"body": {"state": ["<new>", {"prefix": "w&"}]}}'}]},
}
EVERYTHING = {
    "config": {
        "aws": {"region": "eu-west-1", "endpoint_url": "https://aws.example:443"},
        "functions": {"orders": {"url": "https://x.example", "headers": {"X": "${KEY} $${text} ${LATER:-none}"}}},
        "event_source_mappings": [MAPPING],
        "limits": {"buffer_bytes": 268435456},
        "log": {"level": "debug"},
        "lease_seconds": 12.5,
    },
    "image": {"digest": f"sha256:{'0' * 64}"},
    "imagePullSecrets": [{"name": "registry"}],
    "extraArgs": ["--workers", "4"],
    "secretEnv": [{"name": "KEY", "secret": "orders", "key": "api-key"}],
    "secretFiles": [{"secret": "tokens", "mountPath": "/run/secrets/poller"}],
    "env": [{"name": "TZ", "value": "UTC"}],
    "envFrom": [{"secretRef": {"name": "more"}}],
    "serviceAccount": {"roleArn": "arn:aws:iam::123456789012:role/poller", "annotations": {"team": "orders"}},
    "persistence": {"storageClassName": "gp3", "annotations": {"team": "orders"}},
    "affinity": {"nodeAffinity": {}},
    "nodeSelector": {"disk": "fast"},
    "tolerations": [{"key": "spot", "operator": "Exists"}],
    "priorityClassName": "high",
    "podAnnotations": {"team": "orders"},
    "podLabels": {"team": "orders"},
    "extraVolumes": [{"name": "ca", "configMap": {"name": "ca"}}],
    "extraVolumeMounts": [{"name": "ca", "mountPath": "/etc/ca"}],
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
    "networkPolicy": {"enabled": True, "podIdentity": True, "egress": [{"ports": [{"protocol": "TCP", "port": 80}]}]},
}
EVERYTHING_FLEET = {
    **EVERYTHING,
    "config": {**EVERYTHING["config"], **FLEET["config"]},
    "keda": {
        "enabled": True,
        "serverAddress": "http://prometheus:9090",
        "triggers": [{"type": "cpu", "metricType": "Utilization", "metadata": {"value": "80"}}],
    },
}
WORLDS: dict[str, dict[str, Any]] = {
    "default": {},
    "sqlite": yaml.safe_load((EXAMPLES / "sqlite.yaml").read_text()),
    "dynamodb": yaml.safe_load((EXAMPLES / "dynamodb.yaml").read_text()),
    "everything": EVERYTHING,
    "everything-fleet": EVERYTHING_FLEET,
}
every_world = pytest.mark.parametrize("world", WORLDS)


class Helm:
    """Helm, with a home of its own."""

    def __init__(self, home: Path) -> None:
        self._environment = {"PATH": os.environ["PATH"], "HOME": str(home)}

    def run(self, *arguments: str, values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        command = ["helm", *arguments, str(CHART), "-f", "-"]
        text = json.dumps(values)
        return subprocess.run(command, input=text, capture_output=True, text=True, env=self._environment, check=False)

    def objects(self, values: dict[str, Any], release: str = "poller") -> list[dict[str, Any]]:
        made = self.run("template", release, "--namespace", "orders", values=values)
        assert made.returncode == 0, made.stderr
        return [document for document in yaml.safe_load_all(made.stdout) if document]

    def one(self, kind: str, values: dict[str, Any], release: str = "poller") -> dict[str, Any]:
        [found] = [document for document in self.objects(values, release) if document["kind"] == kind]
        return found

    def workload(self, values: dict[str, Any]) -> dict[str, Any]:
        [found] = [item for item in self.objects(values) if item["kind"] in {"StatefulSet", "Deployment"}]
        return found

    def pod(self, values: dict[str, Any]) -> dict[str, Any]:
        return self.workload(values)["spec"]["template"]

    def refusal(self, values: dict[str, Any]) -> str:
        made = self.run("template", "poller", values=values)
        assert made.returncode != 0
        assert not made.stdout
        return made.stderr


@pytest.fixture
def helm(tmp_path):
    return Helm(tmp_path)


def check(document: dict[str, Any]) -> None:
    """By the schemas of all versions, or by that of its CRD."""
    if (schema := CRDS / f"{document['kind']}.json").exists():
        jsonschema.validate(document, json.loads(schema.read_text()))
        return
    from kubernetes_validate import validate  # here: this file is collected where it is absent

    for version in VERSIONS:
        assert validate(document, version, strict=True) == version


# --- what the cluster takes -----------------------------------------------------------------------------------------


@every_world
def test_helm_finds_no_fault_with_the_chart(helm, world):
    """Lint is clean, warnings count."""
    made = helm.run("lint", "--strict", "--quiet", values=WORLDS[world])
    assert (made.returncode, made.stderr) == (0, "")
    assert "WARNING" not in made.stdout


@every_world
def test_every_object_is_valid(helm, world):
    """For Kubernetes, the Prometheus Operator and KEDA; nothing is there twice."""
    made = helm.objects(WORLDS[world])
    for document in made:
        check(document)
    names = [(document["kind"], document["metadata"]["name"]) for document in made]
    assert len(names) == len(set(names))


def test_all_kinds_are_made_and_none_unasked(helm):
    """With everything on there is one of each; by default nothing that needs an operator."""
    always = {"ConfigMap", "Service", "ServiceAccount", "PodDisruptionBudget"}
    kinds = {world: {document["kind"] for document in helm.objects(values)} for world, values in WORLDS.items()}
    assert kinds["default"] == always | {"StatefulSet"}
    assert kinds["everything"] == always | {"StatefulSet", "NetworkPolicy", "ServiceMonitor", "PrometheusRule"}
    assert kinds["everything-fleet"] == kinds["everything"] - {"StatefulSet"} | {"Deployment", "ScaledObject"}


@pytest.mark.parametrize("path", sorted((DEPLOY / "kubernetes" / "manifests").iterdir()), ids=lambda path: path.stem)
def test_the_plain_manifests_are_those_of_the_chart(tmp_path, path):
    """`render.sh` makes the same again; they are valid and leave no trace of Helm."""
    subprocess.run([str(DEPLOY / "kubernetes" / "render.sh"), str(tmp_path)], check=True)
    documents = list(yaml.safe_load_all(path.read_text()))
    assert documents == list(yaml.safe_load_all((tmp_path / path.name).read_text()))
    for document in documents:
        check(document)
    assert "helm" not in path.read_text().lower().replace("deploy/kubernetes/render.sh", "")


@every_world
def test_everything_selects_the_pods(helm, world):
    """Service, budget, policy, monitor, spread and the workload itself mean the pods of this release and no others."""
    made = helm.objects(WORLDS[world])
    pod = helm.pod(WORLDS[world])
    labels = pod["metadata"]["labels"].items()
    service = next(item for item in made if item["kind"] == "Service")
    selectors = [service["spec"]["selector"]]
    for item in made:
        spec = item.get("spec", {})
        if item["kind"] == "ServiceMonitor":
            assert spec["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        elif found := spec.get("podSelector") or (item["kind"] != "Service" and spec.get("selector")):
            selectors.append(found["matchLabels"])
    selectors += [each["labelSelector"]["matchLabels"] for each in pod["spec"].get("topologySpreadConstraints", [])]
    assert len(selectors) >= 3
    for selector in selectors:
        assert selector.items() <= labels
        assert selector["app.kubernetes.io/instance"] == "poller"


# --- the config -----------------------------------------------------------------------------------------------------


@every_world
def test_the_daemon_takes_the_config(helm, world, tmp_path):
    """`poller validate` passes with the pod's own variables and mounted files, and nothing is rounded on the way."""
    values = WORLDS[world]
    text = helm.one("ConfigMap", values)["data"]["poller.yaml"]
    [container] = helm.pod(values)["spec"]["containers"]
    environment = {item["name"]: "0123456789" for item in container.get("env", [])}
    secrets = tmp_path / "secrets"
    for mount in container["volumeMounts"]:
        if mount["name"].startswith("secret-"):
            folder = secrets / mount["mountPath"].lstrip("/")
            folder.mkdir(parents=True)
            (folder / "token").write_text("0123456789")
    path = tmp_path / "poller.yaml"
    path.write_text(text.replace("${file:/", f"${{file:{secrets}/"))
    done = subprocess.run(
        [sys.executable, "-m", "poller", "validate", "-c", str(path)],
        env={"PATH": os.environ["PATH"], **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.replace("warning: ", "")) == (0, done.stderr.replace("warning: ", ""))
    given = yaml.safe_load(text)
    assert {key: given[key] for key in values.get("config", {}) if key != "server"} == {
        key: value if key != "log" else {"format": "json", **value}
        for key, value in values.get("config", {}).items()
        if key != "server"
    }


def test_the_chart_knows_the_keys_of_the_config():
    """The top-level keys that values.schema.json allows are those that the daemon knows."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert schema["properties"]["config"]["properties"].keys() == {field.name for field in CONFIG.fields}


@every_world
def test_the_config_is_a_folder_that_changes(helm, world):
    """It is mounted where `-c` points, read-only, and not by subPath, which would keep the first version for ever."""
    [container] = helm.pod(WORLDS[world])["spec"]["containers"]
    assert container["command"] == ["poller", "run"]
    assert container["args"][:2] == ["-c", "/etc/poller/poller.yaml"]
    [mount] = [item for item in container["volumeMounts"] if item["name"] == "config"]
    assert mount == {"name": "config", "mountPath": "/etc/poller", "readOnly": True}


def checksum(helm: Helm, **values: Any) -> str:
    return helm.pod(values)["metadata"]["annotations"]["checksum/config"]


def test_every_change_of_the_config_restarts_the_pods(helm):
    """The checksum covers all of it; nothing else changes it."""
    changed = {"functions": {"orders": {"url": "http://x.example"}}}
    assert checksum(helm) == checksum(helm, podLabels={"a": "b"})
    assert checksum(helm) != checksum(helm, config=changed)


def test_on_demand_only_what_is_read_at_the_start_restarts_the_pods(helm):
    """With `needed` the checksum covers exactly the keys that a reload leaves as they were."""
    other = {
        "aws": {"region": "eu-west-1"},
        "store": "sqlite:///var/lib/poller/other.db",
        "server": {"port": 9478},
        "retry": {"initial_backoff_seconds": 1},
        "limits": {"buffer_bytes": 10_000_000},
        "tracing": {"endpoint": "http://collector.example:4318"},
        "checkpoint_interval": 0.5,
        "lease_duration": 20,
        "shutdown_grace": 30,
    }
    keys = {
        "checkpoint_interval": "checkpoint_interval_seconds",
        "lease_duration": "lease_seconds",
        "shutdown_grace": "shutdown_grace_seconds",
    }
    assert set(other) == set(_FIXED)
    before = checksum(helm, rollOnConfigChange="needed")
    for name, value in other.items():
        assert checksum(helm, rollOnConfigChange="needed", config={keys.get(name, name): value}) != before, name
    live = {"functions": {"orders": {"url": "http://x.example"}}, "log": {"level": "debug"}}
    assert checksum(helm, rollOnConfigChange="needed", config=live) == before


def test_secrets_are_only_referred_to(helm):
    """Variables come from keys of Secrets; files are read-only and only for the pod's group."""
    spec = helm.pod(EVERYTHING)["spec"]
    [container] = spec["containers"]
    assert {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "orders", "key": "api-key"}}} in container["env"]
    assert {"name": "secret-0", "mountPath": "/run/secrets/poller", "readOnly": True} in container["volumeMounts"]
    assert {"name": "secret-0", "secret": {"secretName": "tokens", "defaultMode": 0o440}} in spec["volumes"]
    assert not [item for item in helm.objects(EVERYTHING) if item["kind"] == "Secret"]


# --- how the pods live and die --------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["sqlite:///var/lib/poller/poller.db", "dynamodb://poller"])
@pytest.mark.parametrize("grace", [0, 25, 25.5, 900, 3600])
def test_the_pod_outlives_its_grace(helm, store, grace):
    """Kubernetes waits for the daemon's own grace, its last writes and its workers' (12 s)."""
    config = {"store": store, "shutdown_grace_seconds": grace}
    assert helm.pod({"config": config})["spec"]["terminationGracePeriodSeconds"] == ceil(grace) + 15
    assert "terminationMarginSeconds" in helm.refusal({"config": config, "terminationMarginSeconds": 11})


def test_probes_ask_what_the_server_leaves_open(helm):
    """Start and liveness /healthz, readiness /readyz, on the config's port and scheme; a store that is away at the start
    has five minutes, a loop that hangs one.
    """
    spec = helm.pod({"config": {"server": {"port": 9999, "tls": {"cert": "/c", "key": "/k"}}}})["spec"]
    [container] = spec["containers"]
    assert container["ports"] == [{"name": "http", "containerPort": 9999}]
    for probe, path in (("startup", "/healthz"), ("liveness", "/healthz"), ("readiness", "/readyz")):
        asked = container[f"{probe}Probe"]["httpGet"]
        assert asked == {"path": path, "port": "http", "scheme": "HTTPS"}
        assert path in _ALWAYS_OPEN
    assert container["startupProbe"]["failureThreshold"] * container["startupProbe"]["periodSeconds"] == 300
    assert container["livenessProbe"]["failureThreshold"] * container["livenessProbe"]["periodSeconds"] == 60


@every_world
def test_pods_are_restricted(helm, world):
    """They pass the Pod Security Standard "restricted", as the image's own user, and write to their volumes only."""
    spec = helm.pod(WORLDS[world])["spec"]
    [container] = spec["containers"]
    dockerfile = (DEPLOY / "container" / "Dockerfile").read_text()
    [user] = [line.split()[1] for line in dockerfile.splitlines() if line.startswith("USER ")]
    pod = spec["securityContext"]
    assert f"{pod['runAsUser']}:{pod['runAsGroup']}" == user
    assert pod["runAsNonRoot"]
    assert pod["fsGroup"] == pod["runAsGroup"]
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")} - {"/etc/ca"}
    is_fleet = helm.workload(WORLDS[world])["kind"] == "Deployment"
    assert writable == ({"/tmp"} if is_fleet else {"/tmp", "/var/lib/poller"})


def test_one_daemon_keeps_its_volume(helm):
    """SQLite: one pod, replaced without help when it was never ready; the claim outlives the release, and nothing in it
    changes with the chart's version, for a claim's template cannot be changed.
    """
    spec = helm.workload(EVERYTHING)["spec"]
    assert spec["replicas"] == 1
    assert spec["podManagementPolicy"] == "Parallel"
    assert spec["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}
    [claim] = spec["volumeClaimTemplates"]
    assert claim["metadata"]["labels"] == spec["selector"]["matchLabels"]
    assert claim["spec"] == {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "gp3",
        "resources": {"requests": {"storage": "1Gi"}},
    }


def test_a_fleet_is_rolled_without_a_gap(helm):
    """A new pod is there before an old one goes; an autoscaler's number of pods is left alone; they are spread."""
    spec = helm.workload({**FLEET, "replicas": 3})["spec"]
    assert spec["replicas"] == 3
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    keys = {each["topologyKey"] for each in spec["template"]["spec"]["topologySpreadConstraints"]}
    assert keys == {"topology.kubernetes.io/zone", "kubernetes.io/hostname"}
    assert "replicas" not in helm.workload(EVERYTHING_FLEET)["spec"]


def test_a_node_can_always_be_drained(helm):
    """One pod at a time, and a pod that is not ready does not count: its sources may be away for days."""
    spec = helm.one("PodDisruptionBudget", {})["spec"]
    assert spec["maxUnavailable"] == 1
    assert spec["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


# --- who watches ----------------------------------------------------------------------------------------------------


def test_the_alerts_are_those_of_the_prometheus_folder(helm):
    """The chart's copy is the same file; Helm takes no `{{ }}` of it for its own; runbooks get their address."""
    rules = (DEPLOY / "prometheus" / "poller.rules.yaml").read_text()
    assert (CHART / "files" / "poller.rules.yaml").read_text() == rules
    on = {"prometheusRule": {"enabled": True}}
    assert helm.one("PrometheusRule", on)["spec"] == yaml.safe_load(rules)
    moved = {"prometheusRule": {"enabled": True, "runbook": "https://wiki.example/poller"}}
    there = yaml.safe_load(rules.replace("README.md#", "https://wiki.example/poller#"))
    assert helm.one("PrometheusRule", moved)["spec"] == there


def test_a_pod_is_scraped_by_one_way(helm):
    """By annotation, or by the ServiceMonitor, which is found by its labels and keeps the job that the alerts look for."""
    annotations = helm.pod({"config": {"server": {"port": 9999}}})["metadata"]["annotations"]
    assert annotations["prometheus.io/scrape"] == "true"
    assert annotations["prometheus.io/port"] == "9999"
    assert "prometheus.io/scrape" not in helm.pod(EVERYTHING)["metadata"]["annotations"]
    assert "prometheus.io/scrape" not in helm.pod({"metrics": {"annotations": False}})["metadata"]["annotations"]
    monitor = helm.one("ServiceMonitor", EVERYTHING)
    [endpoint] = monitor["spec"]["endpoints"]
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": "esm-poller"}]
    assert helm.one("Service", EVERYTHING)["spec"]["publishNotReadyAddresses"] is True


def test_the_fleet_is_scaled_by_its_own_numbers(helm):
    """The queries are the README's, of this release alone where its series can be told apart; never down to nothing."""
    readme = (ROOT / "README.md").read_text()

    def queries(**values: Any) -> list[str]:
        spec = helm.one("ScaledObject", {**EVERYTHING_FLEET, **values})["spec"]
        assert spec["scaleTargetRef"] == {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "name": helm.workload(EVERYTHING_FLEET)["metadata"]["name"],
        }
        return [trigger["metadata"]["query"] for trigger in spec["triggers"] if trigger["type"] == "prometheus"]

    plain = queries(serviceMonitor={"enabled": False})
    assert plain == ["max(poller_behind_latest_seconds)", 'sum(poller_leases{state="owned"})']
    assert all(query in readme for query in plain)
    ours = 'namespace="orders",service="poller-esm-poller"'
    assert queries() == [
        f"max(poller_behind_latest_seconds{{{ours}}})",
        f'sum(poller_leases{{state="owned",{ours}}})',
    ]
    keda = {**EVERYTHING_FLEET["keda"], "selector": 'job="x"'}
    assert queries(keda=keda)[0] == 'max(poller_behind_latest_seconds{job="x"})'


def test_the_network_policy_lets_through_what_it_says(helm):
    """In: the port, for the named peers, nobody when there are none. Out: DNS, AWS, targets; nothing when all is off."""
    spec = helm.one("NetworkPolicy", EVERYTHING)["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    [rule] = spec["ingress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": "http"}]
    assert rule["from"] == [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}},
    ]
    ports = [{port["port"] for port in rule["ports"]} for rule in spec["egress"]]
    assert ports == [{53}, {443}, {80}, {80}]
    closed = {"enabled": True, "ingressFrom": [], "dns": False, "awsCidrs": []}
    spec = helm.one("NetworkPolicy", {"networkPolicy": closed})["spec"]
    assert (spec["ingress"], spec["egress"]) == ([], [])


def test_the_notes_say_how_to_look(helm):
    """After an install: the workload's name, that nothing is polled or watched yet, which doors are closed."""
    said = helm.run("install", "poller", "--dry-run=client", "--namespace", "orders", values={}).stdout
    assert "kubectl -n orders rollout status statefulset/poller-esm-poller" in said
    assert "No mappings are declared yet" in said
    assert "closed until config.server.auth is set" in said
    assert "No alerts are installed" in said
    mine = {**EVERYTHING_FLEET, "config": {**EVERYTHING_FLEET["config"], "server": {"auth": {"type": "bearer"}}}}
    said = helm.run("install", "poller", "--dry-run=client", values=mine).stdout.partition("NOTES:")[2]
    assert "shares the work through dynamodb://poller" in said
    assert "rollout status deployment/poller-esm-poller" in said
    assert not [part for part in ("No mappings", "No alerts", "closed") if part in said]


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_mistakes_are_said_all_at_once_with_their_remedy(helm):
    """What contradicts itself is refused before anything is made, in sentences."""
    said = helm.refusal(
        {
            "config": {
                "store": "sqlite:///tmp/poller.db",
                "server": {"host": "localhost"},
                "functions": {"a": {"url": "http://x/${SECRET}${AWS_REGION}$${TEXT}${LATER:-x}${file:/run/x}"}},
            },
            "replicas": 2,
            "image": {"digest": "latest"},
            "serviceAccount": {"create": False, "roleArn": "admin"},
            "keda": {"enabled": True, "minReplicas": 20},
        }
    )
    start = MISTAKES.partition(" is ")[0]
    assert said[said.index(start) :].partition("\n\n")[0] == MISTAKES


MISTAKES = """\
config.store "sqlite:///tmp/poller.db" is not on the volume, so positions would be lost with the pod; give a path below \
persistence.mountPath, such as sqlite:///var/lib/poller/poller.db.
replicas is 2, but one daemon owns a SQLite file; set replicas to 1, or config.store to dynamodb://TABLE.
keda.enabled needs a fleet, but one daemon owns a SQLite file; set config.store to dynamodb://TABLE, or keda.enabled to \
false.
keda.serverAddress "" is not a URL; give that of the Prometheus that has the poller's metrics, such as \
http://prometheus-operated.monitoring:9090.
keda.minReplicas is 20 and above keda.maxReplicas, which is 10; give one that is not.
serviceAccount.create is false and serviceAccount.name is empty; name the account that the pods use.
serviceAccount.roleArn "admin" is not the ARN of a role; give one such as arn:aws:iam::123456789012:role/esm-poller.
image.digest "latest" is not a digest; give sha256: and 64 hexadecimal digits.
config.server.host is localhost, where neither probes nor Prometheus can reach it; give 0.0.0.0 (or :: for IPv6).
config uses ${SECRET} and nothing sets it; add it to secretEnv or env."""


@pytest.mark.parametrize(
    ("store", "said"),
    [
        ("dynamodb://${TABLE}", "config.store has a ${...} in it, and the chart must know the store; write it out."),
        ("sqlite:./poller.db", 'config.store "sqlite:./poller.db" is not a store for a pod;'),
        ("postgres://db", 'config.store "postgres://db" is not a store for a pod;'),
        ("sqlite:///var/lib/poller/../../../etc/poller.db", "is not on the volume, so positions would be lost"),
        ("sqlite:///var/lib/poller/x/../../poller.db", "is not on the volume, so positions would be lost"),
        ("sqlite:///var/lib/poller/..", "is not on the volume, so positions would be lost"),
    ],
)
def test_the_store_must_be_one_that_the_chart_can_place(helm, store, said):
    """It decides between a volume and a fleet."""
    assert said in helm.refusal({"config": {"store": store}, "env": [{"name": "TABLE", "value": "x"}]})


@pytest.mark.parametrize(
    ("store", "mount"),
    [
        ("sqlite:///var/lib/poller/a/b/../poller.db", "/var/lib/poller"),
        ("sqlite:///data/poller.db", "/var/../data"),
    ],
)
def test_a_path_that_stays_on_the_volume_is_taken(helm, store, mount):
    """However it is written: what it means counts, of the volume's folder too."""
    helm.workload({"config": {"store": store}, "persistence": {"mountPath": mount}})


def test_a_config_that_no_configmap_takes_is_refused(helm):
    """1 MiB; said here, not by the cluster half-way through."""
    functions = {f"function-{number}": {"url": f"http://x.example/{'y' * 500}"} for number in range(2000)}
    assert "and a ConfigMap takes 1 MiB; split it" in helm.refusal({"config": {"functions": functions}})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"replica": 3}, "at '': additional properties 'replica' not allowed"),
        ({"config": {"event_source_mapping": []}}, "additional properties 'event_source_mapping' not allowed"),
        ({"replicas": "3"}, "at '/replicas': got string, want integer"),
        ({"replicas": 0}, "at '/replicas': minimum: got 0, want 1"),
        ({"keda": {"minReplicas": 0}}, "at '/keda/minReplicas': minimum: got 0, want 1"),
        ({"rollOnConfigChange": "never"}, "at '/rollOnConfigChange': value must be one of 'always', 'needed'"),
        ({"secretEnv": [{"name": "KEY"}]}, "at '/secretEnv/0': missing properties 'secret', 'key'"),
        ({"config": {"server": {"port": 0}}}, "at '/config/server/port': minimum: got 0, want 1"),
        (
            {"config": {"shutdown_grace_seconds": "${X}"}},
            "at '/config/shutdown_grace_seconds': got string, want number",
        ),
    ],
)
def test_a_value_of_the_wrong_shape_is_named(helm, values, said):
    """values.schema.json knows every key: the error has the path, what was found and what is wanted."""
    assert said in helm.refusal(values)
