"""``deploy/kubernetes``: the jobs of real steps, with what the values give them, against the API's own schema.

No cluster runs them: scheduling, pulling of images, claims and rights are not tested.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen_pipeline.definitions import code_location
from qwen_pipeline.defs.execution.needs import step_needs
from qwen_pipeline.defs.execution.placement import STEPS
from qwen_pipeline.runner import dagster_home
from qwen_pipeline_tests.defs.execution.test_placement import assets_of, settings_of
from qwen_pipeline_tests.deploy import DEPLOY
from qwen_pipeline_tests.site import Site, site

pytestmark = pytest.mark.lengthy

__all__ = ["site"]

API = "1.37"


@pytest.fixture
def values() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "kubernetes" / "values.yaml").read_text())


def test_the_instance_has_the_limits_of_the_default_one(values: dict[str, Any]) -> None:
    instance = yaml.safe_load(Path(dagster_home.__file__).with_name("dagster.yaml").read_text())
    added = values["additionalInstanceConfig"]
    assert added == {key: instance[key] for key in added}
    assert {"concurrency", "run_retries"} <= added.keys()
    daemon = values["dagsterDaemon"]
    assert not daemon["runCoordinator"]["enabled"], "the chart's would come beside that of additionalInstanceConfig"
    assert not daemon["runRetries"]["enabled"], "likewise"
    postgres = yaml.safe_load((DEPLOY / "postgres" / "dagster.yaml").read_text())
    assert values["pythonLogs"]["dagsterHandlerConfig"] == postgres["python_logs"]["dagster_handler_config"]
    assert daemon["runMonitoring"]["enabled"] == instance["run_monitoring"]["enabled"]


def test_the_job_of_every_step_is_valid_and_has_what_the_step_needs(
    site: Site, values: dict[str, Any], tmp_path: Path
) -> None:
    settings = settings_of(site, "kubernetes")
    jobs = {
        name: job_of(asset.op.tags, values["runLauncher"]["config"]["k8sRunLauncher"], tmp_path)
        for name, asset in assets_of(code_location(settings)).items()
    }
    needs = step_needs(settings)
    for name, job in jobs.items():
        (container,) = job["spec"]["template"]["spec"]["containers"]
        need, resources = needs[STEPS[name]], container["resources"]
        assert resources["limits"]["memory"] == f"{need.memory_bytes // 10**6}M"
        assert resources["requests"]["cpu"] == str(need.cores)
        assert int(resources["limits"].get("nvidia.com/gpu", 0)) == need.gpus
        assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/data", "/etc/qwen-pipeline"}
        assert {"secretRef": {"name": "qwen-pipeline-secrets"}} in container["envFrom"]
        (password,) = (each for each in container["env"] if each["name"] == "DAGSTER_PG_PASSWORD")
        assert password["valueFrom"]["secretKeyRef"]["name"] == "qwen-pipeline-postgres"
        assert job["spec"]["backoffLimit"] == 0, "a step is repeated by Dagster"
    assert {name for name in jobs if needs[STEPS[name]].gpus} == {"quantized_checkpoint", "validated_checkpoint"}


def test_a_misspelt_key_is_refused(site: Site, values: dict[str, Any], tmp_path: Path) -> None:
    asset = assets_of(code_location(settings_of(site, "kubernetes")))["quantized_checkpoint"]
    tag = json.loads(asset.op.tags["dagster-k8s/config"])
    tag["pod_spec_config"]["tolerations"][0]["keyy"] = "x"
    with pytest.raises(Exception, match="keyy"):
        job_of({"dagster-k8s/config": json.dumps(tag)}, values["runLauncher"]["config"]["k8sRunLauncher"], tmp_path)


def job_of(op_tags: Mapping[str, str], launcher: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """Return the job that the executor makes of a step, in the words of the API, after validating it."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    from dagster_k8s import K8sRunLauncher
    from dagster_k8s.container_context import K8sContainerContext
    from dagster_k8s.job import UserDefinedDagsterK8sConfig, construct_dagster_k8s_job, get_user_defined_k8s_config
    from kubernetes.client import ApiClient

    kubeconfig = scratch / "kubeconfig"
    kubeconfig.write_text(json.dumps(KUBECONFIG))
    context = K8sContainerContext.create_from_config({"k8s": snake_case(launcher)})
    context = context.merge(K8sContainerContext(run_k8s_config=get_user_defined_k8s_config(op_tags)))
    run_launcher = K8sRunLauncher(
        dagster_home="/opt/dagster/dagster_home",
        service_account_name="dagster",
        instance_config_map="dagster-instance",
        postgres_password_secret="qwen-pipeline-postgres",
        load_incluster_config=False,
        kubeconfig_file=str(kubeconfig),
    )
    job = construct_dagster_k8s_job(
        job_config=context.get_k8s_job_config("registry.example.org/qwen-pipeline:1", run_launcher),
        args=["dagster", "api", "execute_step"],
        job_name="dagster-step-test",
        user_defined_k8s_config=UserDefinedDagsterK8sConfig.from_dict(dict(context.run_k8s_config.to_dict())),
        component="step_worker",
    )
    rendered: Any = ApiClient().sanitize_for_serialization(job)
    kubernetes_validate.validate(rendered, API, strict=True)
    return rendered


KUBECONFIG = {
    "apiVersion": "v1",
    "kind": "Config",
    "current-context": "none",
    "clusters": [{"name": "none", "cluster": {"server": "http://127.0.0.1:9"}}],
    "users": [{"name": "none", "user": {}}],
    "contexts": [{"name": "none", "context": {"cluster": "none", "user": "none"}}],
}


def snake_case(launcher: Mapping[str, Any]) -> dict[str, Any]:
    """Return the chart's configuration of the launcher in the words of ``dagster.yaml``, as its template writes it."""
    run = launcher["runK8sConfig"]
    return {
        "image_pull_policy": launcher["imagePullPolicy"],
        "env_secrets": [secret["name"] for secret in launcher["envSecrets"]],
        "env_vars": launcher["envVars"],
        "volumes": launcher["volumes"],
        "volume_mounts": launcher["volumeMounts"],
        "run_k8s_config": {"container_config": run["containerConfig"], "pod_spec_config": run["podSpecConfig"]},
    }
