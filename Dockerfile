FROM python:3.11-slim-bookworm AS build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venv && python -m venv /opt/build
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE requirements.lock ./
RUN /opt/build/bin/pip install --no-cache-dir --constraint requirements.lock setuptools mypy cython
COPY third_party third_party
COPY ratelimit_sidecar ratelimit_sidecar
# The hot modules as machine code, by mypyc, and HTTP/2 by Cython and nghttp2.
RUN RATELIMIT_SIDECAR_COMPILE=1 /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
  && /opt/venv/bin/pip install --no-cache-dir --constraint requirements.lock /wheels/*.whl

FROM python:3.11-slim-bookworm
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
# Nobody in particular; it owns no file of the image.
USER 65532:65532
# Envoy's calls, the other sidecars' calls, HTTP for operators.
EXPOSE 8081 50051 8080
HEALTHCHECK --interval=5s --timeout=3s --start-period=10s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/readyz', timeout=2)"]
ENTRYPOINT ["ratelimit-sidecar"]
CMD ["serve"]
