"""Files of ``deploy/``: they parse, and the paths, images and variables that they name exist."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen_pipeline.workers.environments import InstallableName
from qwen_pipeline_tests import REPOSITORY
from qwen_pipeline_tests.deploy import DEPLOY

DOCKERFILES = sorted((DEPLOY / "docker").glob("*Dockerfile"))


def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text())


@pytest.mark.parametrize("file", sorted(DEPLOY.rglob("*.yaml")), ids=lambda file: file.parent.name + "/" + file.name)
def test_a_file_parses_and_explains_itself(file: Path) -> None:
    assert file.read_text().startswith("# ")
    assert isinstance(yaml.safe_load(file.read_text()), dict)


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_what_an_image_copies_and_installs_exists(file: Path) -> None:
    text = file.read_text()
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (REPOSITORY / source).exists(), source
            assert f"!{source.removeprefix('./')}" in ignored, f"{source} is kept from the build"
    engines = re.findall(r"^(?:ARG ENGINES=\"|RUN qwen-pipeline engine install )([\w\- ]+)", text, re.MULTILINE)
    for engine in " ".join(engines).split():
        assert engine in InstallableName.__args__
        assert (REPOSITORY / "qwen_pipeline" / "workers" / "requirements" / f"{engine}.txt").is_file()
    for extra in re.findall(r"^ARG EXTRAS=(\w+)", text, re.MULTILINE):
        assert re.search(rf"^{extra} = ", (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    assert re.findall(r"^USER (\w+)", text, re.MULTILINE)[-1] == "qwen", "no container runs as root"


def test_every_image_starts_from_one_that_another_file_builds() -> None:
    built = set(re.findall(r"--tag (\S+)", "".join(file.read_text() for file in DOCKERFILES)))
    starts = re.findall(
        r"^ARG (?:MAIN|GPTQMODEL)=(\S+)", "".join(file.read_text() for file in DOCKERFILES), re.MULTILINE
    )
    assert len(starts) == 2
    assert built >= {*starts, *(service["image"] for service in compose()["services"].values())} - {"postgres:17"}


def test_compose_mounts_files_that_exist_and_gives_the_instance_its_variables() -> None:
    services = compose()["services"]
    for service in services.values():
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert not source.startswith(".") or (DEPLOY / "docker" / source).is_file(), source
        if build := service.get("build"):
            assert (DEPLOY / "docker" / build["context"] / build["dockerfile"]).is_file()
    wanted = set(re.findall(r"\{env: (\w+)\}", (DEPLOY / "postgres" / "dagster.yaml").read_text()))
    for name in ("code", "webserver", "daemon"):
        assert wanted <= services[name]["environment"].keys()
    (location,) = yaml.safe_load((DEPLOY / "docker" / "workspace.yaml").read_text())["load_from"]
    assert location["grpc_server"]["host"] in services
    assert str(location["grpc_server"]["port"]) in services["code"]["command"]
    published = [port for service in services.values() for port in service.get("ports", ())]
    assert published == ["127.0.0.1:3000:3000"], "the UI has no login"


def test_no_file_holds_a_secret() -> None:
    """Passwords and tokens are variables, secrets of the cluster, or dots."""
    for file in sorted(path for path in DEPLOY.rglob("*") if path.is_file()):
        for name, value in re.findall(r"(?i)\b(\w*(?:password|token|passphrase)\w*)[:=] *(\S*)", file.read_text()):
            assert value.startswith(("$", "{env", "...", "#")) or value in ("", "false"), f"{file.name}: {name}"


def test_the_ray_cluster_is_valid_for_ray() -> None:
    ray = pytest.importorskip("ray", reason="needs the extra ray: pip install 'qwen-pipeline[ray]'")
    import jsonschema

    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    cluster = yaml.safe_load((DEPLOY / "ray" / "cluster.yaml").read_text())
    jsonschema.validate(cluster, schema)
    assert cluster["max_workers"] == len(cluster["provider"]["worker_ips"])


def test_the_batch_script_ends_as_the_run_does_also_after_a_signal(tmp_path: Path) -> None:
    """A stand-in for the command takes a moment to end after SIGTERM, and then ends with 130."""
    script = (DEPLOY / "slurm" / "fine_tune.sbatch").read_text()
    command = tmp_path / "qwen-pipeline"
    command.write_text(
        "#!/bin/sh\ntrap 'sleep 0.2; exit 130' TERM\necho \"$QWEN_PIPELINE_CONFIG $*\"\nwhile :; do sleep 0.1; done\n"
    )
    command.chmod(0o755)
    (tmp_path / "environment").touch()
    script = script.replace("/shared/qwen-pipeline/.venv/bin/qwen-pipeline", str(command))
    script = script.replace("/etc/qwen-pipeline/environment", str(tmp_path / "environment"))
    with subprocess.Popen(["bash", "-c", script, "sbatch", "poet"], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout
        assert running.stdout.readline() == "/shared/qwen-pipeline/qwen_pipeline.toml run poet\n"
        running.terminate()
        assert running.wait(20) == 130
    assert re.findall(r"^#SBATCH --(\S+?)[= ]", script, re.MULTILINE).count("dependency") == 1
