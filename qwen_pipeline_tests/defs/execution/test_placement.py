"""Op tags of the engines, executors, and assets that are otherwise the same."""

import json
import sys

import dagster as dg
import pytest

from qwen_pipeline.config import Settings
from qwen_pipeline.config.execution import Execution
from qwen_pipeline.definitions import code_location
from qwen_pipeline.defs.execution.needs import step_needs
from qwen_pipeline.defs.execution.placement import STEPS, executor_of
from qwen_pipeline.defs.resources import StepRunner
from qwen_pipeline.errors import EnvironmentFault
from qwen_pipeline_tests.site import FINE_TUNE, Site

EXTRA = {"ray": "dagster_ray", "kubernetes": "dagster_k8s"}


def settings_of(site: Site, kind: str, more: str = "") -> Settings:
    """Return the settings of a site on several machines with GPUs."""
    pytest.importorskip(EXTRA[kind], reason=f"needs the extra {kind}: pip install 'qwen-pipeline[{kind}]'")
    file = site.root / "qwen_pipeline.toml"
    file.write_text(file.read_text().replace("threads = 1\n", 'threads = 6\ndevice = "cuda"\n'))
    site.configure(f'{more}\n[execution]\nkind = "{kind}"\n')
    return site.settings


def assets_of(definitions: dg.Definitions) -> dict[str, dg.AssetsDefinition]:
    assets = (asset for asset in definitions.assets or () if isinstance(asset, dg.AssetsDefinition))
    return {asset.op.name: asset for asset in assets}


def test_only_the_op_tags_and_the_retries_of_an_asset_change(site: Site) -> None:
    here = code_location(site.settings)
    there = code_location(settings_of(site, "kubernetes"))
    dg.Definitions.validate_loadable(there)
    local, placed = assets_of(here), assets_of(there)
    assert local.keys() == placed.keys() < STEPS.keys()
    for name, asset in local.items():
        op, again = asset.op, placed[name].op
        assert again.tags.keys() - op.tags.keys() == {"dagster-k8s/config"}
        assert (op.retry_policy, again.retry_policy) == (None, dg.RetryPolicy(max_retries=2, delay=30))
        for member in ("pool", "version", "description", "required_resource_keys", "compute_fn"):
            assert getattr(again, member) == getattr(op, member), (name, member)
        assert placed[name].specs_by_key == asset.specs_by_key
        assert placed[name].check_specs_by_output_name == asset.check_specs_by_output_name


def test_ray_is_asked_for_what_a_step_needs(site: Site) -> None:
    settings = settings_of(site, "ray")
    from dagster_ray.configs import RayExecutionConfig  # pyright: ignore[reportMissingImports]

    needs = step_needs(settings)
    for name, asset in assets_of(code_location(settings)).items():
        asked, need = RayExecutionConfig.from_tags(dict(asset.op.tags)), needs[STEPS[name]]
        assert (asked.num_cpus, asked.memory, asked.num_gpus) == (need.cores, need.memory_bytes, need.gpus)
    assert needs["quantize"].cores == 6
    assert needs["quantize"].gpus == 1


def test_a_failed_check_is_not_retried(site: Site) -> None:
    """Retries are for lost nodes: the failure of a step says that it is not to be repeated."""
    upload = site.drop()
    (upload / "more.safetensors.part").touch()
    definitions = code_location(settings_of(site, "kubernetes"), StepRunner(retry_delays=()))
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions("fine_tunes", [FINE_TUNE])
        result = definitions.resolve_job_def("process_fine_tune").execute_in_process(
            instance=instance,
            partition_key=FINE_TUNE,
            asset_selection=[dg.AssetKey("fine_tune")],
            raise_on_error=False,
        )
    assert not result.success
    assert {event.event_type_value for event in result.all_events} & {"STEP_FAILURE", "STEP_UP_FOR_RETRY"} == {
        "STEP_FAILURE"
    }


@pytest.mark.parametrize("kind", EXTRA)
def test_an_integration_that_is_not_installed_is_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, EXTRA[kind], None)
    with pytest.raises(
        EnvironmentFault, match=rf"(?s)execution\.kind is '{kind}'.*pip install 'qwen-pipeline\[{kind}\]'"
    ):
        executor_of(Execution.model_validate({"kind": kind}))
    assert executor_of(Execution()) is dg.in_process_executor


def test_serving_ranks_get_shared_memory_and_an_image_of_their_own(site: Site) -> None:
    serving = '\n[validation.serve]\nengine = "vllm"\ntensor_parallel = [4]\n'
    image = '[execution.kubernetes]\nimages = { validate = "serving:1" }\n'
    settings = settings_of(site, "kubernetes", serving + image)
    tag = json.loads(assets_of(code_location(settings))["validated_checkpoint"].op.tags["dagster-k8s/config"])
    assert tag["container_config"]["image"] == "serving:1"
    assert tag["container_config"]["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert tag["pod_spec_config"]["volumes"][0]["empty_dir"] == {"medium": "Memory"}
