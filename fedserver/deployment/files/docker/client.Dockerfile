# A fedbraid device. Not built by this project's checks; kept to what docs/deployment.md does by hand.
#   docker build -f fedserver/deployment/files/docker/client.Dockerfile -t fedbraid-client .
#   docker run -v node:/state -v DATA:/data fedbraid-client \
#     client join https://HOST:8443 --token TOKEN --folder /state/node --data /data/FILE
#   docker run -v node:/state -v DATA:/data fedbraid-client
FROM python:3.12-slim
RUN apt-get update \
 && apt-get install -y --no-install-recommends build-essential \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --create-home --home-dir /state fedbraid
COPY . /source
RUN pip install --no-cache-dir --constraint /source/constraints.txt \
      --build-constraint /source/constraints.txt '/source[client]' \
 && rm -rf /source
USER fedbraid
VOLUME /state
ENTRYPOINT ["fedbraid"]
CMD ["client", "run", "--folder", "/state/node"]
