#!/usr/bin/env bash
# Does the wheel work by itself? Builds it, installs it into an environment of its own, runs the command given as
# arguments in an empty folder outside the checkout, and compares the output with the checkout's, byte for byte.
# PYTHON: the interpreter of the checkout's environment.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "building the wheel"
"$PYTHON" -m build --wheel --no-isolation --outdir "$work/dist" "$checkout" >"$work/build.log" 2>&1 \
    || { cat "$work/build.log" >&2; exit 1; }
echo "installing $(basename "$work"/dist/*.whl), $(du -k "$work"/dist/*.whl | cut -f1) kB, in an environment of its own"
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check install -qq \
    --constraint "$checkout/constraints.txt" "$work"/dist/*.whl

mkdir "$work/empty"
cd "$work/empty"
echo "running simmem $* in an empty folder"
"$work/venv/bin/simmem" "$@" >"$work/from_wheel"
"$(dirname "$PYTHON")/simmem" "$@" >"$work/from_checkout"
cmp "$work/from_wheel" "$work/from_checkout"
for list in devices models traces policies; do
    "$work/venv/bin/simmem" "$list" >/dev/null
done
left=$(ls -A "$work/empty")
[ -z "$left" ] || { echo "the command left files behind: $left" >&2; exit 1; }
echo "the wheel gives the checkout's answer: $(wc -c <"$work/from_wheel") bytes, the same"
