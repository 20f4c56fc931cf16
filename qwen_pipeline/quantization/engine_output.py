"""What an engine's process returned, kept beside its checkpoint: an engine that has delivered is not started again."""

import json
from dataclasses import asdict, dataclass

from qwen_pipeline.checkpoint.files import sync_tree, write_bytes
from qwen_pipeline.quantization.spec import QuantJob
from qwen_pipeline.workers.parent import WorkerResult

_FILE = "delivery.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOutput:
    """A finished ``job.packed``.

    Attributes:
        worker: What the process returned.
        seconds: What it took from its task to its result.
    """

    worker: WorkerResult
    seconds: float

    def keep(self, job: QuantJob) -> None:
        """Write this down, once all of ``job.packed`` is on the disk."""
        sync_tree(job.packed)
        write_bytes(job.work_dir / _FILE, json.dumps(asdict(self)).encode())

    @classmethod
    def find(cls, job: QuantJob) -> "EngineOutput | None":
        """Return what an earlier attempt at the same job kept."""
        if not (job.work_dir / _FILE).exists():
            return None
        kept = json.loads((job.work_dir / _FILE).read_bytes())
        return cls(worker=WorkerResult(**kept["worker"]), seconds=kept["seconds"])
