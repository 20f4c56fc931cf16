# The pipeline and GPTQModel's environment: steps that quantize, and validations without a serving engine.
#   docker build --file deploy/docker/gptqmodel.Dockerfile --tag qwen-pipeline-gptqmodel:1 .
# The pins are those of qwen_pipeline/workers/requirements/gptqmodel.txt.
ARG MAIN=qwen-pipeline:1
FROM ${MAIN}

USER root
# A compiler: GPTQModel and Triton build kernels when they are installed and when they run.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN qwen-pipeline engine install gptqmodel
# The NVIDIA runtime gives a container no devices without these.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER qwen
