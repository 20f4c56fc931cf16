"""The result of a quantizer's process, saved in its working directory so that a finished quantizer is not run again."""

import json
from dataclasses import asdict, dataclass

from qwen_pipeline.checkpoint.files import sync_tree, write_bytes
from qwen_pipeline.quantization.job import QuantJob
from qwen_pipeline.workers.parent import WorkerResult

_FILE = "delivery.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOutput:
    """The result of a quantizer whose checkpoint ``job.packed`` is finished.

    Attributes:
        worker: The result of the quantizer's process.
        seconds: Time from sending the job to receiving the result.
    """

    worker: WorkerResult
    seconds: float

    def save(self, job: QuantJob) -> None:
        """Write the result, after all of ``job.packed`` is on disk."""
        sync_tree(job.packed)
        write_bytes(job.work_dir / _FILE, json.dumps(asdict(self)).encode())

    @classmethod
    def load(cls, job: QuantJob) -> "EngineOutput | None":
        """Return the result that an earlier attempt at the same job saved, if there is one."""
        if not (job.work_dir / _FILE).exists():
            return None
        saved = json.loads((job.work_dir / _FILE).read_bytes())
        return cls(worker=WorkerResult(**saved["worker"]), seconds=saved["seconds"])
