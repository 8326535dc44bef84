#!/usr/bin/env bash
# mypy on the package as it installs: in a checkout its folders lie beside was_fx/, where mypy does not look.
set -euo pipefail
cd "$(dirname "$0")/.."
layout=$(mktemp -d)
trap 'rm -rf "$layout"' EXIT
cp -r was_fx "$layout/was_fx"
for folder in passes kernels schedules cli; do cp -r "$folder" "$layout/was_fx/$folder"; done
cd "$layout"
mypy --config-file "$OLDPWD/pyproject.toml" -p was_fx
