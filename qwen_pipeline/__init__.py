"""Merge, pad, quantize, validate and publish fine-tunes of Qwen models: ``import qwen_pipeline as qp``.

Every name of the Python API is imported on first use, so that the command line's help and worker processes start
without torch, pydantic or Dagster. ``docs/python.md`` shows the API at work.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_pipeline.api import plan as plan
    from qwen_pipeline.audits import audit_frame
    from qwen_pipeline.checkpoint.manifest import Manifest as Manifest
    from qwen_pipeline.checkpoint.store.destinations import Artifact as Artifact
    from qwen_pipeline.checkpoint.store.destinations import CheckpointStore as CheckpointStore
    from qwen_pipeline.checkpoint.store.destinations import Directory as Directory
    from qwen_pipeline.config import Settings as Settings
    from qwen_pipeline.config import load_settings as load_settings
    from qwen_pipeline.errors import AdapterRefused as AdapterRefused
    from qwen_pipeline.errors import CheckFailed as CheckFailed
    from qwen_pipeline.errors import CheckpointRefused as CheckpointRefused
    from qwen_pipeline.errors import DestinationLocked as DestinationLocked
    from qwen_pipeline.errors import DestinationRefused as DestinationRefused
    from qwen_pipeline.errors import EnvironmentFault as EnvironmentFault
    from qwen_pipeline.errors import InputRefused as InputRefused
    from qwen_pipeline.errors import PipelineError as PipelineError
    from qwen_pipeline.errors import QuantizedInputRefused as QuantizedInputRefused
    from qwen_pipeline.errors import WorkerFailed as WorkerFailed
    from qwen_pipeline.evaluation.allocation.goals import Goal as Goal
    from qwen_pipeline.evaluation.limits import Limits as Limits
    from qwen_pipeline.evaluation.plan import ValidationInputs as ValidationInputs
    from qwen_pipeline.evaluation.plan import ValidationPlan as ValidationPlan
    from qwen_pipeline.evaluation.report.frame import report_frame
    from qwen_pipeline.evaluation.tensor_parallel.findings import Target as Target
    from qwen_pipeline.intake.placement import settings_of_product as settings_of_product
    from qwen_pipeline.models.base_names import KnownBase as KnownBase
    from qwen_pipeline.models.open import open_model
    from qwen_pipeline.quantization.calibration.spec import CalibrationSpec as CalibrationSpec
    from qwen_pipeline.quantization.evidence import evidence_frame
    from qwen_pipeline.quantization.spec import QuantSpec as QuantSpec
    from qwen_pipeline.qwen.padding_spec import PaddingSpec as PaddingSpec
    from qwen_pipeline.releases.promotion import approve as approve
    from qwen_pipeline.releases.promotion import promote as promote
    from qwen_pipeline.releases.promotion import rollback as rollback
    from qwen_pipeline.reports import CheckReport as CheckReport
    from qwen_pipeline.retention.collect import collect as collect
    from qwen_pipeline.stages.allocate import AllocationInputs as AllocationInputs
    from qwen_pipeline.stages.allocate import allocate as allocate
    from qwen_pipeline.stages.calibrate import calibrate as calibrate
    from qwen_pipeline.stages.convert import convert as convert
    from qwen_pipeline.stages.export import export as export
    from qwen_pipeline.stages.merge import merge as merge
    from qwen_pipeline.stages.merge_pad import merge_pad as merge_pad
    from qwen_pipeline.stages.pad import pad as pad
    from qwen_pipeline.stages.publish import publish as publish
    from qwen_pipeline.stages.quantize import quantize as quantize
    from qwen_pipeline.stages.repair import repair as repair
    from qwen_pipeline.stages.unpad import unpad as unpad
    from qwen_pipeline.stages.validate import validate as validate
    from qwen_pipeline.status import status_frame
    from qwen_pipeline.text.spec import TextSpec as TextSpec
    from qwen_pipeline.transforms.codes.base_weights import BaseWeights as BaseWeights
    from qwen_pipeline.workers.environments import find_environment as find_environment

    audit = audit_frame
    checks = report_frame
    evidence = evidence_frame
    fine_tune_status = status_frame
    open_checkpoint = open_model

__version__ = "0.1.0"

_API = {
    "AdapterRefused": "errors:AdapterRefused",
    "AllocationInputs": "stages.allocate:AllocationInputs",
    "Artifact": "checkpoint.store.destinations:Artifact",
    "BaseWeights": "transforms.codes.base_weights:BaseWeights",
    "CalibrationSpec": "quantization.calibration.spec:CalibrationSpec",
    "CheckFailed": "errors:CheckFailed",
    "CheckReport": "reports:CheckReport",
    "CheckpointRefused": "errors:CheckpointRefused",
    "CheckpointStore": "checkpoint.store.destinations:CheckpointStore",
    "DestinationLocked": "errors:DestinationLocked",
    "DestinationRefused": "errors:DestinationRefused",
    "Directory": "checkpoint.store.destinations:Directory",
    "EnvironmentFault": "errors:EnvironmentFault",
    "Goal": "evaluation.allocation.goals:Goal",
    "InputRefused": "errors:InputRefused",
    "KnownBase": "models.base_names:KnownBase",
    "Limits": "evaluation.limits:Limits",
    "Manifest": "checkpoint.manifest:Manifest",
    "PaddingSpec": "qwen.padding_spec:PaddingSpec",
    "PipelineError": "errors:PipelineError",
    "QuantSpec": "quantization.spec:QuantSpec",
    "QuantizedInputRefused": "errors:QuantizedInputRefused",
    "Settings": "config:Settings",
    "Target": "evaluation.tensor_parallel.findings:Target",
    "TextSpec": "text.spec:TextSpec",
    "ValidationInputs": "evaluation.plan:ValidationInputs",
    "ValidationPlan": "evaluation.plan:ValidationPlan",
    "WorkerFailed": "errors:WorkerFailed",
    "allocate": "stages.allocate:allocate",
    "approve": "releases.promotion:approve",
    "audit": "audits:audit_frame",
    "calibrate": "stages.calibrate:calibrate",
    "checks": "evaluation.report.frame:report_frame",
    "collect": "retention.collect:collect",
    "convert": "stages.convert:convert",
    "evidence": "quantization.evidence:evidence_frame",
    "export": "stages.export:export",
    "find_environment": "workers.environments:find_environment",
    "fine_tune_status": "status:status_frame",
    "load_settings": "config:load_settings",
    "merge": "stages.merge:merge",
    "merge_pad": "stages.merge_pad:merge_pad",
    "open_checkpoint": "models.open:open_model",
    "pad": "stages.pad:pad",
    "plan": "api:plan",
    "promote": "releases.promotion:promote",
    "publish": "stages.publish:publish",
    "quantize": "stages.quantize:quantize",
    "repair": "stages.repair:repair",
    "rollback": "releases.promotion:rollback",
    "settings_of_product": "intake.placement:settings_of_product",
    "unpad": "stages.unpad:unpad",
    "validate": "stages.validate:validate",
}
"""Name in the API -> ``module:attribute`` below this package; the imports above say the same to type checkers."""


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _API[name].partition(":")
    globals()[name] = value = getattr(import_module(f"{__name__}.{module}"), attribute)
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _API.keys())
