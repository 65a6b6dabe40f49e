# Build:     docker build -t fastbegan .
#            docker build -t fastbegan --build-arg TORCH=2.7.1 .    for P100, V100 and drivers before 580
# Run:       docker run --rm --gpus all --ipc=host --user "$(id -u):$(id -g)" -v fastbegan-cache:/cache -v "$PWD:/work" fastbegan train
# Apptainer: apptainer build fastbegan.sif docker-daemon:fastbegan:latest && mkdir -p cache && apptainer run --nv --bind "$PWD/cache:/cache" fastbegan.sif train
# Without a GPU, leave out --gpus all and --nv.
FROM python:3.11-slim

# Triton and torch.compile compile at run time: Triton its launchers by gcc, torch.compile its CPU kernels by g++.
# Versions are not pinned, because Debian's mirrors keep only the newest.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*

ARG TORCH=
WORKDIR /src
COPY . .
RUN case "$TORCH" in \
        "") pins="constraints.txt" ;; \
        2.7.1) pins="constraints-torch27.txt" ;; \
        *) echo "TORCH is $TORCH; accepted: 2.7.1, or nothing for the newest tested" >&2; exit 2 ;; \
    esac \
    && pip install --no-cache-dir -c "$pins" ".[eval,hub]"

# One volume holds all caches. Any user may write to it, because --user and Apptainer bring their own.
ENV FASTBEGAN_CACHE=/cache \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    MPLCONFIGDIR=/cache/matplotlib \
    HF_HOME=/cache/huggingface
RUN useradd --uid 1000 --create-home fastbegan && mkdir /cache /work && chmod 1777 /cache /work
VOLUME ["/cache"]
WORKDIR /work
USER 1000
ENTRYPOINT ["fastbegan"]
CMD ["--help"]
