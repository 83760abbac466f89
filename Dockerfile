# Suiron in a container. `gateway`, the default, is without torch; `local` has it, for models in the container itself.
#
#   docker build -t suiron .
#   docker build -t suiron:local --target local --build-arg PIP_EXTRA_INDEX_URL=…    an index with the torch you want
#   docker run --read-only --tmpfs /tmp -v suiron:/var/lib/suiron -v ./my.yaml:/etc/suiron/gateway.yaml:ro -p 8000:8000 suiron
#
# The volume has the ledger, as long as the configuration names no database, and what is under way, in any case.
# The configuration inside answers `echo`, to the container alone: mount one with `server.host: 0.0.0.0` and keys over it.

FROM python:3.11.14-slim-bookworm AS base
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

FROM base AS wheel
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY gateway gateway
COPY adapters adapters
RUN python -m pip wheel --no-deps --wheel-dir /wheels .

FROM base AS installed
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL
COPY constraints.txt /wheels/
COPY --from=wheel /wheels /wheels
RUN python -m venv /opt/suiron
RUN /opt/suiron/bin/python -m pip install -c /wheels/constraints.txt --find-links /wheels "suiron[postgres]"

FROM installed AS installed-local
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL
RUN /opt/suiron/bin/python -m pip install -c /wheels/constraints.txt --find-links /wheels "suiron[local]"

FROM base AS runtime
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin suiron \
    && install -d -m 700 -o suiron -g suiron /var/lib/suiron
COPY config/gateway.yaml /etc/suiron/gateway.yaml
ENV PATH=/opt/suiron/bin:$PATH HOME=/tmp XDG_STATE_HOME=/var/lib
VOLUME /var/lib/suiron
WORKDIR /tmp
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "from urllib.request import *; build_opener(ProxyHandler({})).open('http://127.0.0.1:8000/health/ready', timeout=2)"]
ENTRYPOINT ["suiron"]
CMD ["serve", "--config", "/etc/suiron/gateway.yaml"]

FROM runtime AS local
COPY --from=installed-local /opt/suiron /opt/suiron
# where models from the hub are kept: mount a volume that uid 10001 may write to
ENV HF_HOME=/models
USER 10001:10001

FROM runtime AS gateway
COPY --from=installed /opt/suiron /opt/suiron
USER 10001:10001
