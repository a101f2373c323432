# d3po on an NVIDIA GPU. In the clone: docker build -f deploy/cuda.Dockerfile -t d3po:cuda .
# For drivers before 580, add: --build-arg TORCH_BACKEND=cu126
# docs/how-to/install.md says how to run it.
FROM python:3.12-slim-bookworm AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim-bookworm
ARG TORCH_BACKEND=cu130
COPY --from=wheel /wheels /wheels
COPY constraints.txt deploy/serve.sh /usr/local/share/d3po/
# torch brings the CUDA libraries, the host the driver. model.compile needs a C compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ \
    && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir --constraint /usr/local/share/d3po/constraints.txt uv \
    && uv pip install --system --no-cache --torch-backend "$TORCH_BACKEND" \
        --constraint /usr/local/share/d3po/constraints.txt \
        "$(echo /wheels/*.whl)[cluster,mirror,servers]" \
    && useradd --create-home --uid 1000 d3po \
    && install --directory --owner d3po --group d3po /project /data
USER 1000
WORKDIR /project
RUN d3po init .
# Campaigns, databases and downloaded models stay in the volume.
ENV D3PO_DATA=/data HF_HOME=/data/hub NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME /data
ENTRYPOINT ["d3po"]
CMD ["run", "sd15"]
