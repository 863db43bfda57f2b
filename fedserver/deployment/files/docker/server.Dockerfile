# A fedbraid server. Not built by this project's checks; kept to what docs/deployment.md does by hand.
#   docker build -f fedserver/deployment/files/docker/server.Dockerfile -t fedbraid-server .
#   docker run -p 8443:8443 -v fedbraid:/state fedbraid-server --name HOST
#   docker exec CONTAINER fedbraid server invite /state/server NAME
FROM python:3.12-slim
RUN apt-get update \
 && apt-get install -y --no-install-recommends nginx build-essential \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --create-home --home-dir /state fedbraid
COPY . /source
RUN pip install --no-cache-dir --constraint /source/constraints.txt \
      --build-constraint /source/constraints.txt '/source[server]' \
 && rm -rf /source
USER fedbraid
VOLUME /state
EXPOSE 8443
HEALTHCHECK CMD ["fedbraid", "server", "status", "/state/server"]
ENTRYPOINT ["fedbraid", "server", "up", "/state/server", "--foreground", "--listen", "0.0.0.0:8443"]
