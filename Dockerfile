# The command `latentreward`, with the server, for CPUs:
#
#   docker build -t latentreward .
#   docker run --rm latentreward configs
#   docker run --rm -p 8000:8000 -e LATENTREWARD_TOKEN -v "$PWD/my_reward:/data/my_reward:ro" \
#     latentreward serve /data/my_reward --host 0.0.0.0
#
# For GPUs, with the driver and NVIDIA's container toolkit on the host: build with --build-arg INDEX= and run with
# --gpus all.
FROM python:3.11-slim-bookworm AS build
ARG INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /source
COPY . .
RUN python -m venv /opt/latentreward \
    && PIP_EXTRA_INDEX_URL="$INDEX" /opt/latentreward/bin/pip install --no-cache-dir ".[serve]"

FROM python:3.11-slim-bookworm
COPY --from=build /opt/latentreward /opt/latentreward
# Not root: a stranger's file that breaks a library should not own the container.
RUN useradd --create-home --uid 1000 user
USER 1000
WORKDIR /home/user
ENV PATH=/opt/latentreward/bin:$PATH
EXPOSE 8000
ENTRYPOINT ["latentreward"]
CMD ["--help"]
