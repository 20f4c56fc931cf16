"""The sections about the assets in Dagster's UI: prices, freshness, automation and links to the code."""

from typing import Annotated

from pydantic import Field

from qwen_pipeline.config.sections import Section

Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Days = Annotated[float, Field(gt=0, le=36_500)]


class Costs(Section):
    """Prices, from which the cost of each stage is computed. Without any, no cost is stated.

    Attributes:
        machine_hour: Price of an hour of the machine, without its GPUs.
        gpu_hour: Price of an hour of one GPU, in addition.
    """

    machine_hour: Price = 0
    gpu_hour: Price = 0


class Assets(Section):
    """The assets in Dagster's UI.

    Attributes:
        base_days: Days after which a base model that no run has read is shown as stale; by default never.
        release_days: Days after which a pipeline without a release is shown as stale; by default never.
        audit_days: Days after which releases that were not audited are shown as stale.
        automation: Whether Dagster materializes the outputs of a stage again by itself once the data of its inputs or
            the version of its code changed. Without it, arrivals, the nightly schedule and people start runs.
        source_url: The directory of this code in a repository that a browser can open, such as
            ``https://github.com/acme/qwen-pipeline/blob/main``, for links from the assets; by default they lead to
            files of the server.
    """

    base_days: Days | None = None
    release_days: Days | None = None
    audit_days: Days | None = 8
    automation: bool = False
    source_url: Annotated[str, Field(pattern=r"https?://\S+")] | None = None
