"""CycloneDX SBOM of this package itself: every distribution that it needs, as installed.

Run it with ``make sbom``, or ``python -m qwen_pipeline.lineage.product_bom``. Environments of engines have lists of
their own (``workers/requirements``).
"""

import json
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import Any

PRODUCT = "qwen-pipeline"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def product_bom() -> dict[str, Any]:
    """Return the SBOM of the installed package; the same environment gives the same one."""
    found = dict(sorted(_closure(PRODUCT).items()))
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": _component(PRODUCT, found.pop(PRODUCT), kind="application")},
        "components": [_component(name, each) for name, each in found.items()],
        "dependencies": [
            {"ref": name, "dependsOn": sorted({need for need in _needs(each) if need in found})}
            for name, each in (_closure(PRODUCT)).items()
        ],
    }


def _closure(root: str) -> dict[str, Distribution]:
    """Return the distributions that one needs, directly or not, by their normalized names."""
    found: dict[str, Distribution] = {}
    left = [root]
    while left:
        if (name := left.pop()) in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # an extra, or for another platform
            continue
        left += _needs(found[name])
    return found


def _needs(each: Distribution) -> Iterator[str]:
    for requirement in each.requires or ():
        if "extra ==" not in requirement and (match := _NAME.match(requirement)):
            yield _normalized(match[0])


def _component(name: str, each: Distribution, *, kind: str = "library") -> Mapping[str, Any]:
    metadata: Any = each.metadata
    license_name = metadata.get("License-Expression")
    return {
        "type": kind,
        "bom-ref": name,
        "name": name,
        "version": each.version,
        "purl": f"pkg:pypi/{name}@{each.version}",
        **({"licenses": [{"expression": license_name}]} if license_name else {}),
    }


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    print(json.dumps(product_bom(), indent=2))
