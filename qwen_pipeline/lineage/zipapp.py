"""``python -m qwen_pipeline.lineage.zipapp verify.pyz``: the command ``verify`` as one file for a serving host.

It needs Python 3.11 and, for signatures, ``cryptography``; with ``blake3``, which vLLM brings, it compares tensors too.
The same sources give the same bytes.
"""

import sys
import zipfile
from pathlib import Path

MODULES = (
    "__init__.py",
    "errors.py",
    "checkpoint/__init__.py",
    "checkpoint/buffers.py",
    "checkpoint/files.py",
    "checkpoint/safetensors_file.py",
    "checkpoint/store/__init__.py",
    "checkpoint/store/canonical.py",
    "lineage/__init__.py",
    "lineage/verification/*.py",
)
"""Everything that verification imports, relative to the package."""
_MAIN = "from qwen_pipeline.lineage.verification.__main__ import script\n\nscript()\n"
_TIME = (1980, 1, 1, 0, 0, 0)


def build(out: Path) -> Path:
    """Write an executable archive; return its path."""
    package = Path(__file__).parents[1]
    files = sorted({path for pattern in MODULES for path in package.glob(pattern)})
    with out.open("wb") as file:
        file.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in files:
                name = f"{package.name}/{path.relative_to(package).as_posix()}"
                archive.writestr(zipfile.ZipInfo(name, _TIME), path.read_bytes(), zipfile.ZIP_DEFLATED)
            archive.writestr(zipfile.ZipInfo("__main__.py", _TIME), _MAIN, zipfile.ZIP_DEFLATED)
    out.chmod(0o755)
    return out


if __name__ == "__main__":
    print(build(Path(sys.argv[1] if sys.argv[1:] else "verify.pyz")))
