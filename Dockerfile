# mmray with its pinned versions and all it uses, for the nodes of cluster.yaml, cluster-gcp.yaml and kubernetes/.
# In the checkout:
#   docker build -t registry.example.com/mmray:0.2.0 .                          # --target efa: for GPU nodes on AWS
#   docker push registry.example.com/mmray:0.2.0
FROM rayproject/ray:2.60.0-py312-gpu AS mmray
WORKDIR /home/ray/mmray
COPY --chown=1000:100 . .

# The torch of PyPI is built for CUDA 13, whose driver is 580 or newer. For older drivers take a build for CUDA 12:
#   --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126
ARG TORCH_INDEX=""
RUN test -z "$TORCH_INDEX" || \
    python -m pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"
# boto3 and google-api-python-client: with them the head starts nodes on AWS and on Google Cloud.
RUN python -m pip install --no-cache-dir -c constraints.txt boto3 google-api-python-client \
    -e '.[cluster,s3,adapters,bitsandbytes,heif,huggingface,trackers]'

# Ray's workers find `jobs` and `pipelines` here; a job's own --working-dir comes before it.
ENV PYTHONPATH=/home/ray/mmray

# With EFA's libraries and NCCL's plugin for it. The machine's own image has the kernel module.
FROM mmray AS efa
ARG EFA_INSTALLER=1.43.2
USER 0
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /tmp/efa
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends curl pciutils && \
    curl -fsSL "https://efa-installer.amazonaws.com/aws-efa-installer-$EFA_INSTALLER.tar.gz" | \
    tar -xz --strip-components=1 && ./efa_installer.sh -y --skip-kmod --skip-limit-conf --no-verify && ldconfig && \
    rm -rf /tmp/efa /var/lib/apt/lists/*
USER 1000
WORKDIR /home/ray/mmray

# `docker build` without --target makes this one.
FROM mmray
