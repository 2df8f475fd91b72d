# The images of the operator, of the built-in worker and of the demo's data source.
#
# `make images` builds them: it fills build/wheels on the host first, from the lock files, so that nothing here needs a
# network. No step needs a shell, nor does anything that runs in the images.
ARG BASE=python:3.13-slim

FROM ${BASE} AS builder
COPY dev/images/install.py /install.py
RUN ["python3", "/install.py", "prepare"]

# -- the operator ------------------------------------------------------------------------------------------------------

FROM builder AS operator-packages
COPY requirements/operator.lock /lock
COPY build/wheels/operator /wheels
RUN ["python3", "/install.py", "packages", "--check", "cryptography.x509,kopf,kubernetes.aio.client,pydantic_settings,structlog"]

FROM operator-packages AS operator-app
COPY build/wheels/ingestrun /own
RUN ["python3", "/install.py", "app", "--script", "ingestrun-operator"]

FROM ${BASE} AS operator
COPY --from=operator-packages /venv /venv
COPY --from=builder /stdlib /
COPY --from=operator-app /app /venv
ENV PATH=/venv/bin:/usr/local/bin:/usr/bin:/bin HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
LABEL org.opencontainers.image.title="ingestrun-operator" org.opencontainers.image.licenses="Apache-2.0"
USER 65532:65532
WORKDIR /
ENTRYPOINT ["/venv/bin/ingestrun-operator"]
CMD ["run"]

# -- the built-in worker -----------------------------------------------------------------------------------------------

FROM builder AS worker-packages
COPY requirements/worker.lock /lock
COPY build/wheels/worker /wheels
RUN ["python3", "/install.py", "packages", "--check", "pyarrow.csv,pyarrow.compute,pyarrow.dataset,pyarrow.json,pyarrow.parquet,fsspec,httpx,pydantic"]

FROM worker-packages AS worker-app
COPY build/wheels/ingestrun /own
RUN ["python3", "/install.py", "app", "--script", "ingestrun-worker"]

FROM ${BASE} AS worker
COPY --from=worker-packages /venv /venv
COPY --from=builder /stdlib /
COPY --from=worker-app /app /venv
ENV PATH=/venv/bin:/usr/local/bin:/usr/bin:/bin HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
LABEL org.opencontainers.image.title="ingestrun-worker" org.opencontainers.image.licenses="Apache-2.0"
USER 65532:65532
WORKDIR /
ENTRYPOINT ["/venv/bin/ingestrun-worker"]

# -- the demo's data source, and its check of what has arrived ---------------------------------------------------------

FROM builder AS demo-packages
COPY requirements/demo.lock /lock
COPY build/wheels/demo /wheels
COPY build/wheels/demo-data /built
RUN ["python3", "/install.py", "packages", "--check", "duckdb"]

FROM ${BASE} AS demo-source
COPY --from=demo-packages /venv /venv
COPY --from=builder /stdlib /
COPY dev/demo/source_server.py dev/demo/check_dataset.py /demo/
ENV PATH=/venv/bin:/usr/local/bin:/usr/bin:/bin HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
LABEL org.opencontainers.image.title="ingestrun-demo" org.opencontainers.image.licenses="Apache-2.0"
USER 65532:65532
WORKDIR /
ENTRYPOINT ["/venv/bin/python", "/demo/source_server.py"]
