"""The user, trigger, code and packages behind a derivation, as far as this machine knows them.

These are claims of the machine, for the ``run`` of a manifest; no digest covers them.
"""

import getpass
import hashlib
import json
import re
import sys
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

FIELDS = ("user", "trigger", "run", "commit", "code", "packages")
"""The fields of a run's environment that are not versions."""
_PACKAGE = Path(__file__).parents[2]
_started: ContextVar[Mapping[str, str]] = ContextVar("started", default={})  # noqa: B039 (never changed)


@contextmanager
def started_through(trigger: str, *, run: str = "", otherwise: bool = False) -> Generator[None, None, None]:
    """Record within the body that derivations were started through a trigger, such as ``sensor fine_tune_inbox``.

    Args:
        trigger: The kind of the trigger and its name.
        otherwise: Whether an outer trigger counts instead, if there is one.
        run: Id of the run in Dagster.
    """
    outer = _started.get().get("trigger") if otherwise else None
    token = _started.set({"trigger": outer or trigger, **({"run": run} if run else {})})
    try:
        yield
    finally:
        _started.reset(token)


def origin() -> dict[str, str]:
    """Return ``user``, ``trigger``, ``run``, ``commit``, ``code`` and ``packages``; what is not known is left out."""
    user: dict[str, str] = {}
    with suppress(OSError, KeyError, ImportError):  # a container's user may have no name
        user["user"] = getpass.getuser()
    commit = _commit()
    known = {"commit": commit} if commit else {}
    return user | dict(_started.get()) | known | {"code": code_digest(), "packages": packages_digest()}


@cache
def code_digest(package: Path = _PACKAGE) -> str:
    """Return ``sha256:`` and the SHA-256 over this package's sources, as ``sha256sum`` lists them.

    A commit says which code was checked out, this digest whether it was changed.
    """
    files = {path.relative_to(package.parent).as_posix(): path for path in package.rglob("*.py")}
    return _sha256(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}" for name, path in sorted(files.items()))


@cache
def packages_digest() -> str:
    """Return ``sha256:`` and the SHA-256 over the sorted lines ``name==version`` of every installed package."""
    return _sha256(installed_packages())


def installed_packages() -> list[str]:
    """Return ``name==version`` of every installed package but this one, with normalized names (PEP 503)."""
    found = {path.stem for place in sys.path for path in Path(place or ".").glob("*.dist-info")}
    named = (name.partition("-") for name in found)
    lines = {f"{re.sub('[-_.]+', '-', name).lower()}=={version}" for name, _, version in named}
    return sorted(line for line in lines if not line.startswith("qwen-pipeline=="))


def _sha256(lines: Iterable[str]) -> str:
    text = "".join(f"{line}\n" for line in lines)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


@cache
def _commit() -> str | None:
    """Return the commit that the package was installed from, or that its checkout is at."""
    with suppress(PackageNotFoundError, ValueError, KeyError, TypeError):
        installed = json.loads(distribution("qwen-pipeline").read_text("direct_url.json") or "{}")
        return str(installed["vcs_info"]["commit_id"])
    with suppress(OSError):
        return checked_out_commit(Path(__file__).parents[3] / ".git")
    return None


def checked_out_commit(git: Path) -> str | None:
    """Return the commit of a checkout's HEAD, read from its files; None if there is no checkout."""
    if git.is_file():  # a linked worktree
        git = Path(git.read_text().removeprefix("gitdir:").strip())
    head = (git / "HEAD").read_text().strip()
    if not head.startswith("ref: "):
        return head
    shared = git / "commondir"
    common, name = git / shared.read_text().strip() if shared.is_file() else git, head.removeprefix("ref: ")
    if (common / name).is_file():
        return (common / name).read_text().strip()
    packed = common / "packed-refs"
    lines = packed.read_text().splitlines() if packed.is_file() else []
    return next((commit for commit, _, ref in (line.partition(" ") for line in lines) if ref == name), None)


if __name__ == "__main__":
    print(*installed_packages(), sep="\n")
    print(json.dumps(origin(), indent=2), file=sys.stderr)
