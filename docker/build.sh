#!/bin/sh
# Builds the images and writes beside them what they hold: docker/build.sh FOLDER. `make images` calls it.
#   VARIANT=tensorrt                engines for NVIDIA GPUs; workers and distillers get the tag VERSION-tensorrt
#   IMAGE_PREFIX=registry.example.com/fewstep/
#   TORCH_PIP_ARGS="--index-url …"   where PyTorch comes from
#   BUILD_ARGS="--build-arg BASE=…"  more for docker build: BASE, BUILD_BASE, PACKAGES (docker/Dockerfile)
set -eu
cd "$(dirname "$0")/.."
folder=$1
# Debian's own command line, where it is, brings BuildKit; another may need a plug-in for it.
docker=${DOCKER:-$(PATH=/usr/bin:$PATH command -v docker || echo docker)}
variant=${VARIANT:-cpu}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
mkdir -p "$folder"
for target in gateway worker distiller; do
    tag=$version
    if [ "$variant" != cpu ] && [ "$target" != gateway ]; then tag=$version-$variant; fi
    image=${IMAGE_PREFIX:-}fewstep-$target:$tag
    # shellcheck disable=SC2086
    DOCKER_BUILDKIT=1 $docker build --file docker/Dockerfile --target "$target" --tag "$image" \
        --build-arg VARIANT="$variant" ${BUILD_ARGS:-} \
        ${TORCH_PIP_ARGS+--build-arg "TORCH_PIP_ARGS=$TORCH_PIP_ARGS"} \
        --label org.opencontainers.image.version="$version" \
        --label org.opencontainers.image.revision="$(git rev-parse HEAD)" \
        --label org.opencontainers.image.created="$(git log -1 --format=%cI)" .
    $docker run --rm --network none --entrypoint cat "$image" /opt/fewstep/sbom.cdx.json >"$folder/fewstep-$target-$tag.cdx.json"
    $docker image inspect --format "$image {{.Size}} bytes" "$image"
done
