# A server for one base and its deltas. Build: docker build -t deltaserve .
# Run (the endpoint is reachable from outside the container, so it must have a key):
#   docker run --gpus all -p 8000:8000 -e DELTASERVE_API_KEY=... \
#     -v /models:/models:ro deltaserve serve /models/base --delta acme=/models/acme.delta \
#     --host 0.0.0.0
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

# Triton compiles its kernels at run time and needs a C compiler and Python's headers.
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-dev gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 10001 deltaserve
RUN python3 -m venv /opt/deltaserve
ENV PATH=/opt/deltaserve/bin:$PATH

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY deltaserve deltaserve
COPY kernels kernels
COPY compress compress
COPY bench bench
RUN pip install --no-cache-dir '.[gpu]' && rm -rf /src/*

USER deltaserve
WORKDIR /home/deltaserve
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["deltaserve"]
CMD ["--help"]
