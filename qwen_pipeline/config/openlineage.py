"""The section of OpenLineage events."""

from typing import Annotated

from pydantic import Field, model_validator

from qwen_pipeline.config.sections import ConfiguredPath, Section


class OpenLineage(Section):
    """Events for a data catalogue that reads OpenLineage, such as Marquez, DataHub or OpenMetadata.

    Attributes:
        url: Address that events are posted to, such as ``http://marquez:5000``; without it and ``file``, there are
            none.
        endpoint: Path below the address.
        file: A file that events are appended to, one JSON object a line.
        namespace: Namespace of jobs and datasets.
    """

    url: Annotated[str | None, Field(pattern=r"^https?://\S+$")] = None
    endpoint: str = "api/v1/lineage"
    file: ConfiguredPath | None = None
    namespace: str = "qwen-pipeline"

    @property
    def is_on(self) -> bool:
        return bool(self.url or self.file)

    @model_validator(mode="after")
    def _require_one_place(self) -> "OpenLineage":
        if self.url and self.file:
            raise ValueError("events go to a url or to a file; pass one of them")
        return self
