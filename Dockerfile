# All images of the pipeline, one target each: kafka, cassandra (the official ones plus the JMX agent), source,
# ingest-producer, stream-processor, metrics-dashboard. `docker compose build` builds them; compilers stay behind.

# ---- the agent that exports the servers' own metrics ------------------------------------------------------------
FROM maven:3-eclipse-temurin-17 AS jmx-agent
ARG JMX_AGENT_VERSION=1.0.1
RUN --mount=type=cache,target=/cache/maven \
    mvn -q -B -Dmaven.repo.local=/cache/maven dependency:copy -Dartifact=io.prometheus.jmx:jmx_prometheus_javaagent:${JMX_AGENT_VERSION} \
        -DoutputDirectory=/agent -Dmdep.stripVersion=true

FROM apache/kafka:4.3.1 AS kafka
COPY --from=jmx-agent --chmod=444 /agent/jmx_prometheus_javaagent.jar /opt/jmx/agent.jar
COPY --chmod=444 prometheus/jmx/kafka.yml /opt/jmx/rules.yml

FROM cassandra:5.0.9 AS cassandra
COPY --from=jmx-agent --chmod=444 /agent/jmx_prometheus_javaagent.jar /opt/jmx/agent.jar
COPY --chmod=444 prometheus/jmx/cassandra.yml /opt/jmx/rules.yml
# A write is acknowledged when it is on the disk: by the default, `periodic`, a node that is killed loses the last ones.
RUN sed -i -e 's/^commitlog_sync: periodic/commitlog_sync: batch/' -e '/^commitlog_sync_period:/d' /etc/cassandra/cassandra.yaml \
 && grep -q '^commitlog_sync: batch' /etc/cassandra/cassandra.yaml

# ---- the page ---------------------------------------------------------------------------------------------------
FROM node:22-bookworm-slim AS page
WORKDIR /page
COPY crates/metrics-dashboard/web/package.json crates/metrics-dashboard/web/package-lock.json \
     crates/metrics-dashboard/web/.npmrc ./
RUN --mount=type=cache,target=/cache/npm npm ci --cache /cache/npm
COPY crates/metrics-dashboard/web ./
RUN npm run build

# ---- the programs -----------------------------------------------------------------------------------------------
FROM rust:1.95-slim-bookworm AS programs
RUN apt-get update \
 && apt-get install -y --no-install-recommends cmake g++ make pkg-config \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY Cargo.toml Cargo.lock ./
COPY crates crates
COPY streams streams
COPY --from=page /page/dist crates/metrics-dashboard/web/dist
# What cargo fetched and compiled outlives the layer; the programs leave it.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/build/target,sharing=locked \
    cargo build --release --locked -p source-simulator -p ingest-producer -p stream-processor -p metrics-dashboard \
 && install -Dt /programs target/release/source-simulator target/release/ingest-producer \
        target/release/stream-processor target/release/metrics-dashboard

# ---- what runs --------------------------------------------------------------------------------------------------
FROM debian:bookworm-slim AS runtime
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin pipeline
# Succeeds when http://127.0.0.1:PORT/PATH answers 200: `ready PORT PATH`.
COPY --chmod=555 <<'SCRIPT' /usr/local/bin/ready
#!/bin/bash
exec 3<>"/dev/tcp/127.0.0.1/$1" || exit 1
printf 'GET %s HTTP/1.0\r\nHost: localhost\r\n\r\n' "$2" >&3
read -r -t 5 _ status _ <&3 && [ "$status" = 200 ]
SCRIPT
COPY streams /streams
ENV PIPELINE_STREAM=/streams/user_created.toml PIPELINE_LOG_FORMAT=json
USER pipeline

FROM runtime AS source
COPY --from=programs /programs/source-simulator /usr/local/bin/
EXPOSE 8090
ENTRYPOINT ["source-simulator"]
CMD ["--listen", "0.0.0.0:8090"]

FROM runtime AS ingest-producer
COPY --from=programs /programs/ingest-producer /usr/local/bin/
ENV PIPELINE_HTTP_LISTEN=0.0.0.0:9101
EXPOSE 9101
ENTRYPOINT ["ingest-producer"]
CMD ["run"]

FROM runtime AS stream-processor
COPY --from=programs /programs/stream-processor /usr/local/bin/
# A new named volume takes this folder's owner.
USER root
RUN install -d -o pipeline -g pipeline -m 750 /checkpoints
USER pipeline
VOLUME /checkpoints
ENV PIPELINE_HTTP_LISTEN=0.0.0.0:9102 PIPELINE_CHECKPOINTS=/checkpoints
EXPOSE 9102
ENTRYPOINT ["stream-processor"]
CMD ["run"]

FROM runtime AS metrics-dashboard
COPY --from=programs /programs/metrics-dashboard /usr/local/bin/
ENV PIPELINE_HTTP_LISTEN=0.0.0.0:8050
EXPOSE 8050
ENTRYPOINT ["metrics-dashboard"]
