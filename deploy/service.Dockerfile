# The service: REST, dashboard and scheduler. No torch.
#
#   docker build --file deploy/service.Dockerfile --tag regtune-service .

FROM python:3.11-slim AS build
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM python:3.11-slim
RUN useradd --create-home --uid 10001 regtune
COPY requirements/service.txt /requirements.txt
RUN pip install --no-cache-dir --require-hashes --requirement /requirements.txt
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir --no-deps /wheels/*.whl

USER regtune
WORKDIR /home/regtune
ENV PYTHONUNBUFFERED=1 REGTUNE_HOST=0.0.0.0 REGTUNE_PORT=8700
EXPOSE 8700
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8700/readyz', timeout=4)"]
STOPSIGNAL SIGTERM
CMD ["regtune", "service"]
