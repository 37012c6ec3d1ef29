# The image that trains: megatron-core and this package on NVIDIA's PyTorch. tools/build_image.sh
# builds it.
#
# 26.06 is the image that Megatron-LM core_v0.19.0 itself is built in (docker/.ngc_version.dev
# there): its PyTorch, Transformer Engine and Apex are built for each other and stay as they are.
# Any other Debian or Ubuntu with Python 3.12 or newer does; without PyTorch it gets the index's.
# A tag can be moved: NAME@sha256:… cannot, and tools/build_image.sh says what to give it.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE_IMAGE}

USER 0

# Triton and torch.compile call the compiler when training starts, so it stays; torchrun calls numactl for
# NUMA_BINDING. What the base has is left alone, as NVIDIA's compiler and Python.
# APT_PACKAGES="openssh-client pdsh" for launchers that want them.
ARG APT_PACKAGES=""
# DL3008: the base's distribution fixes the versions. SC2086: the variable is a list.
# hadolint ignore=DL3008,SC2086
RUN packages=$APT_PACKAGES \
    && { command -v g++ || packages="g++ $packages"; } \
    && { command -v numactl || packages="numactl $packages"; } \
    && { python3 -m pip --version || packages="python3-pip $packages"; } \
    && include=$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))') \
    && { [ -e "$include/Python.h" ] || packages="python3-dev $packages"; } \
    && if [ -n "$packages" ]; then \
        apt-get update \
        && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $packages \
        && rm -rf /var/lib/apt/lists/*; \
    fi

# A random uid has no home of its own. OpenShift gives one group 0, and so may others (docker run
# --user UID:0): what the user may, that group may, and nobody else.
RUN useradd --uid 10001 --gid 0 --no-log-init --create-home xielu && chmod 0770 /home/xielu

# Beside the distribution's, which pip cannot replace. It checks archives and index better
# (CVE-2026-3219, CVE-2026-13346), and knows constraints for what it builds with.
RUN PIP_CONSTRAINT='' PIP_ROOT_USER_ACTION=ignore \
        python3 -m pip install --no-cache-dir --break-system-packages --ignore-installed pip==26.3

# Everything from the package index, before the code: a changed line of code rebuilds none of it.
# PIP_CONSTRAINT replaces NVIDIA's list, which pins far more than what the image was built around.
WORKDIR /opt/megatron_xielu
COPY pyproject.toml constraints.txt ./
COPY tools/image_dependencies.py tools/
RUN python3 tools/image_dependencies.py /tmp/dependencies \
    && PIP_CONSTRAINT=/tmp/dependencies/constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
        PIP_ROOT_USER_ACTION=ignore python3 -m pip install --no-cache-dir --break-system-packages \
        --requirement /tmp/dependencies/requirements.txt \
    && rm -r /tmp/dependencies

# Megatron's wheel has its dataset helpers built for some Pythons, and no Makefile for the others.
# SC2046: --includes prints several arguments.
# hadolint ignore=SC2046
RUN python3 -c 'import megatron.core.datasets.helpers_cpp' \
    || { folder=$(python3 -c 'import megatron.core.datasets as d; print(*d.__path__)') \
        && suffix=$(python3 -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))') \
        && g++ -O3 -Wall -shared -std=c++17 -fPIC $(python3 -m pybind11 --includes) \
            "$folder/helpers.cpp" -o "$folder/helpers_cpp$suffix" \
        && python3 -c 'import megatron.core.datasets.helpers_cpp'; } \
    && rm -rf /tmp/torchinductor_*

# Sentence splitting needs punkt_tab, which comes from GitHub and not from the package index. Fill
# this folder with --build-arg NLTK_PACKAGES=punkt_tab, by a nltk_data/ beside this file when
# building, or by a mount when training. Nothing else needs it.
ARG NLTK_PACKAGES=""
ENV NLTK_DATA=/opt/megatron_xielu/nltk_data
RUN mkdir -p "$NLTK_DATA" \
    && for package in $NLTK_PACKAGES; do \
        python3 -m nltk.downloader --exit-on-error --dir "$NLTK_DATA" "$package" || exit 1; \
    done

# Installed in place: a checkout mounted over this folder is what runs. It is built by the setuptools
# of constraints.txt; the base's own list would pin another.
COPY . .
RUN PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_ROOT_USER_ACTION=ignore \
        python3 -m pip install --no-cache-dir --break-system-packages --no-deps --editable . \
    && chmod -R a+rX . \
    && mkdir -p runs && chown 10001:0 runs && chmod 0775 runs

ENV HOME=/home/xielu
USER 10001:0

# Seldom and without the GPUs: it must not take time and memory from the training beside it.
HEALTHCHECK --interval=30m --timeout=5m --start-period=5m \
    CMD ["env", "CUDA_VISIBLE_DEVICES=", "python3", "-m", "megatron_xielu.selftest"]

ARG BASE_IMAGE
ARG VERSION=unknown
ARG COMMIT=unknown
# What preflight.sh compares between nodes.
ENV MEGATRON_XIELU_IMAGE=${VERSION}-${COMMIT}
LABEL org.opencontainers.image.title="megatron_xielu" \
    org.opencontainers.image.description="Trainable activations xIELU and xIPReLU for NVIDIA Megatron-LM" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.base.name="${BASE_IMAGE}" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${COMMIT}"
