# docker build -t fourm .
# docker run --gpus all --ipc host -v /data:/data -v "$PWD:/work" fourm train --config my_config.yaml
FROM python:3.12-slim

# torch brings CUDA in its wheels; only torch.compile needs a compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY . .
RUN pip install --no-cache-dir '.[diffusion,hub]'

WORKDIR /work
ENV OMP_NUM_THREADS=1
# On several GPUs: --entrypoint torchrun … fourm --nproc_per_node=8 -m fourm train --config my_config.yaml
ENTRYPOINT ["fourm"]
