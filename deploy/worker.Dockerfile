# A worker: PyTorch with its CUDA libraries; the host brings the driver. No web framework.
#
#   docker build --file deploy/worker.Dockerfile --tag regtune-worker .
#   docker run --gpus all --env REGTUNE_DATABASE_URL=postgresql://… regtune-worker

FROM python:3.11-slim AS build
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM python:3.11-slim
# Steps are compiled: the compiler is used on a GPU as well.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
# Volumes take over the owner of the folders that they cover.
RUN useradd --create-home --uid 10001 regtune && install --directory --owner regtune /data /claims
COPY requirements/worker.txt /requirements.txt
RUN pip install --no-cache-dir --require-hashes --requirement /requirements.txt
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir --no-deps /wheels/*.whl

USER regtune
WORKDIR /home/regtune
ENV PYTHONUNBUFFERED=1 REGTUNE_DATA_DIR=/data REGTUNE_HOME=/claims
HEALTHCHECK --interval=30s --timeout=20s --start-period=60s CMD ["regtune", "worker", "--check"]
STOPSIGNAL SIGTERM
CMD ["regtune", "worker", "--gpu", "free"]
