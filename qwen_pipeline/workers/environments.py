"""An environment of its own for each engine, layered on the main one: their pins collide, their torch need not.

``<sys.prefix>/engines/<name>`` is a virtual environment whose site-packages holds one ``.pth`` file that names the main
environment's. What ``requirements/<name>.txt`` pins is installed above and shadows it. A seal, written last, tells a
whole environment from what an interrupted installation left.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path
from typing import Any, Literal, get_args

from qwen_pipeline.errors import EnvironmentFault, InputRefused
from qwen_pipeline.progress import Observe, Progress, unobserved
from qwen_pipeline.workers.parent import run_worker

EnvironmentName = Literal["gptqmodel", "autogptq", "vllm", "vllm-cpu", "lm-eval"]
ENVIRONMENTS_ROOT = Path(sys.prefix) / "engines"
SEAL = "qwen-pipeline.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class _EnvironmentPackages:
    """What to import to prove that an engine works, and whose versions to tell."""

    modules: tuple[str, ...]
    distributions: tuple[str, ...]


_ENVIRONMENTS: Mapping[str, _EnvironmentPackages] = {
    "gptqmodel": _EnvironmentPackages(
        modules=("gptqmodel", "optimum", "transformers"),
        distributions=("gptqmodel", "optimum", "transformers", "torch"),
    ),
    "autogptq": _EnvironmentPackages(
        modules=("auto_gptq", "transformers"), distributions=("auto_gptq", "transformers", "torch")
    ),
    "vllm": _EnvironmentPackages(modules=("vllm",), distributions=("vllm", "transformers", "torch")),
    "vllm-cpu": _EnvironmentPackages(modules=("vllm",), distributions=("vllm-cpu", "transformers", "torch")),
    "lm-eval": _EnvironmentPackages(
        modules=("lm_eval", "transformers"), distributions=("lm-eval", "transformers", "torch")
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerEnvironment:
    """The interpreter that an engine runs under."""

    name: str
    python: Path

    @property
    def package(self) -> str:
        """The name of the engine's own package."""
        return _ENVIRONMENTS[self.name].distributions[0]

    @property
    def module(self) -> str:
        """The name that its own package is imported by."""
        return _ENVIRONMENTS[self.name].modules[0]

    def versions(self, *packages: str) -> dict[str, str]:
        """Return versions of packages, by default of all that tell engines apart, as a worker would find them.

        They come from metadata; nothing is imported.
        """
        code = "import sys, json, importlib.metadata as m; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
        command = [str(self.python), "-P", "-c", code, *(packages or _ENVIRONMENTS[self.name].distributions)]
        try:
            found = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            raise EnvironmentFault(
                f"{self.python} lacks {self.name}: {lines[-1]}", remedy=_install(self.name)
            ) from error
        return json.loads(found.stdout)


def find_environment(name: str, python: Path | None = None, *, engines: Path = ENVIRONMENTS_ROOT) -> WorkerEnvironment:
    """Return an engine's environment: the installed one, or any whose ``python`` the user names.

    Raises:
        EnvironmentFault: It is not installed, or its installation was not finished.
    """
    _require_name(name)
    if python is None:
        python = engines / name / "bin" / "python"
        if not (engines / name / SEAL).is_file():
            state = "was not installed completely" if python.exists() else "is not installed"
            raise EnvironmentFault(f"The engine {name} {state} ({engines / name}).", remedy=_install(name))
    if not python.exists():
        raise EnvironmentFault(f"{python} does not exist.", remedy="Name the python of an environment with the engine.")
    return WorkerEnvironment(name=name, python=python)


def install_environment(
    name: str, observe: Observe = unobserved, *, engines: Path = ENVIRONMENTS_ROOT
) -> WorkerEnvironment:
    """Build an engine's environment, unless it is there and was built from the same requirements.

    Raises:
        EnvironmentFault: No virtual environment can be made, pip fails (its last lines are quoted), or the engine
            cannot be imported afterwards.
    """
    _require_name(name)
    root, seal = engines / name, _seal(name)
    with _lock(engines, name) as lock:
        if not (root / SEAL).is_file() or (root / SEAL).read_text() != seal:
            _build(name, root, lock, observe)
            (root / f"{SEAL}.tmp").write_text(seal)
            (root / f"{SEAL}.tmp").replace(root / SEAL)
    return find_environment(name, engines=engines)


def check_environment(name: str, *, engines: Path = ENVIRONMENTS_ROOT) -> Mapping[str, str]:
    """Import the engine in its own process and return the versions of its packages.

    Raises:
        EnvironmentFault: It is not installed, or it cannot be imported; the end of the traceback is quoted.
    """
    return _import_engine(find_environment(name, engines=engines))


def import_packages(spec: Mapping[str, Any], _: Observe) -> Mapping[str, Any]:
    """Import packages; runs in the engine's process."""
    for package in spec["packages"]:
        import_module(package)
    return {}


def _import_engine(environment: WorkerEnvironment) -> Mapping[str, str]:
    target = f"{__name__}:{import_packages.__name__}"
    with tempfile.TemporaryDirectory() as scratch:
        spec = {"packages": _ENVIRONMENTS[environment.name].modules}
        run_worker(environment.python, target, spec, log=Path(scratch) / "import.log")
    return environment.versions()


def _build(name: str, root: Path, lock: int, observe: Observe) -> None:
    requirements = _requirements(name)
    total = sum(1 for line in requirements.splitlines() if line and not line.startswith("#")) + 2
    tell = _Teller(f"install {name}", total, observe)
    tell.step("making a virtual environment")
    shutil.rmtree(root, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(root)], lock, tell)
    python = root / "bin" / "python"
    (_site_packages(python) / "main-environment.pth").write_text(f"{_main_packages()}\n")
    pins = root / "requirements.txt"
    pins.write_text(requirements)
    pip = [str(python), "-m", "pip", "install", "--no-deps", "--no-input", "--disable-pip-version-check"]
    _run([*pip, "--progress-bar", "off", "--requirement", str(pins)], lock, tell)
    tell.step(f"importing {name}")
    _import_engine(WorkerEnvironment(name=name, python=python))


def _site_packages(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.check_output([python, "-c", code], text=True).strip())


@dataclass(slots=True)
class _Teller:
    """Counts the steps of an installation and remembers the last lines of its output."""

    task: str
    total: int
    observe: Observe
    done: int = 0

    def step(self, remark: str) -> None:
        self.observe(Progress(task=self.task, done=min(self.done, self.total), total=self.total, remark=remark))
        self.done += 1


def _run(command: list[str], lock: int, tell: _Teller) -> None:
    """Run an installer, one step per package. It keeps the lock should we die before it does."""
    tail: deque[str] = deque(maxlen=15)
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        pass_fds=(lock,),
        env=os.environ | {"BUILD_CUDA_EXT": "0"},
    ) as installer:
        assert installer.stdout is not None
        for line in installer.stdout:
            tail.append(line.rstrip())
            if line.startswith(("Collecting", "Processing", "Requirement already satisfied", "Installing collected")):
                tell.step(line.strip()[:100])
    if installer.returncode != 0:
        raise EnvironmentFault(
            "\n".join([f"{' '.join(command[1:4])} of the engine's environment failed; its last lines:", *tail]),
            remedy="Mend what the last lines name (network, proxy, package index, disk space) and install again.",
        )


@contextmanager
def _lock(engines: Path, name: str) -> Generator[int, None, None]:
    """Wait for whoever installs the same engine."""
    try:
        engines.mkdir(parents=True, exist_ok=True)
        file = (engines / f".{name}.lock").open("w")
    except OSError as error:
        raise EnvironmentFault(
            f"{engines} cannot be written: {error.strerror}.", remedy="Use a virtual environment that you may write to."
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _seal(name: str) -> str:
    """What an environment was built from and upon; another text means that it has to be built again."""
    sha = hashlib.sha256(_requirements(name).encode()).hexdigest()
    return json.dumps({"requirements": f"sha256:{sha}", "above": str(_main_packages())}) + "\n"


def _main_packages() -> Path:
    return Path(sysconfig.get_path("purelib")).resolve()


def _requirements(name: str) -> str:
    return (resources.files("qwen_pipeline.workers") / "requirements" / f"{name}.txt").read_text()


def _require_name(name: str) -> None:
    if name not in get_args(EnvironmentName):
        raise InputRefused(
            f"There is no engine {name!r}.", remedy=f"Choose one of {', '.join(get_args(EnvironmentName))}."
        )


def _install(name: str) -> str:
    return f"Install it: qwen-pipeline engine install {name}"
