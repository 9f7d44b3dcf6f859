#!/bin/sh
# Ends the making of /opt/fewstep: Fewstep itself, nothing that no process runs, and a list of all packages.
# The arguments are folders of Fewstep that this image does without.
set -eu
site=$(echo /opt/fewstep/lib/python3.*/site-packages)
pip --python /opt/fewstep/bin/python3 install --quiet --no-deps --force-reinstall /wheels/fewstep-*.whl
pip --python /opt/fewstep/bin/python3 check
cyclonedx-py environment --output-reproducible --output-format JSON --output-file /opt/fewstep/sbom.cdx.json /opt/fewstep/bin/python3
for folder in "$@"; do rm -rf "${site:?}/$folder"; done
# Headers and static libraries: no image has a compiler. Compiled Python stays, since a read-only system cannot make it.
rm -rf "$site"/torch/include "$site"/torch/share /opt/fewstep/include
find "$site" -type f \( -name '*.a' -o -name '*.pyx' -o -name '*.pxd' \) -delete
