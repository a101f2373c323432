# d3po on a CPU. In the clone: docker build -f deploy/cpu.Dockerfile -t d3po:cpu .
# docs/how-to/install.md says how to run it.
FROM python:3.12-slim-bookworm AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim-bookworm
COPY --from=wheel /wheels /wheels
COPY constraints.txt deploy/serve.sh /usr/local/share/d3po/
# The CPU's build of torch: without CUDA.
RUN pip install --no-cache-dir --constraint /usr/local/share/d3po/constraints.txt uv \
    && uv pip install --system --no-cache --torch-backend cpu \
        --constraint /usr/local/share/d3po/constraints.txt \
        "$(echo /wheels/*.whl)[cluster,mirror,servers]" \
    && useradd --create-home --uid 1000 d3po \
    && install --directory --owner d3po --group d3po /project /data
USER 1000
WORKDIR /project
RUN d3po init .
# Campaigns, databases and downloaded models stay in the volume.
ENV D3PO_DATA=/data HF_HOME=/data/hub
VOLUME /data
ENTRYPOINT ["d3po"]
CMD ["run", "round"]
