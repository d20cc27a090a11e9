# An image with layersmith. For a CPU:
#   docker build -t layersmith .
# For NVIDIA GPUs (the host needs the NVIDIA container toolkit; run with --gpus all):
#   docker build -t layersmith:cuda --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 \
#     --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# The CUDA base images have no Python. gcc is what torch.compile calls.
RUN if ! command -v pip >/dev/null; then \
      apt-get update && apt-get install -y --no-install-recommends python3 python3-venv gcc \
      && rm -rf /var/lib/apt/lists/*; \
    fi \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# Dependencies come before the sources, so that a change of the sources does not install them again.
WORKDIR /opt/layersmith
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN grep -ivE '^torch( |=|@|$)' constraints.txt > other-constraints.txt \
    && pip install --no-cache-dir --index-url ${TORCH_INDEX} --extra-index-url https://pypi.org/simple 'torch>=2.10' \
    && mkdir -p src/layersmith && touch src/layersmith/__init__.py \
    && pip install --no-cache-dir -c other-constraints.txt '.[gguf]'
COPY src src
RUN pip install --no-cache-dir --no-deps --force-reinstall .

# Runs and the caches of models and descriptions are on a volume.
ENV HF_HOME=/data/huggingface LAYERSMITH_CACHE=/data/layersmith
WORKDIR /data
VOLUME /data
ENTRYPOINT ["layersmith"]
CMD ["--help"]
