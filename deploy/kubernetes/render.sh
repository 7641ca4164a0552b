#!/usr/bin/env bash
# Makes what is made from other files: the chart's copy of the alert rules, and the plain manifests.
# Usage: render.sh [FOLDER]   where the manifests go; default: manifests/ beside this script. Needs helm.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/manifests}
mkdir -p "$out"
[ $# -gt 0 ] || cp "$here/../prometheus/poller.rules.yaml" "$here/chart/files/poller.rules.yaml"
for name in sqlite dynamodb; do
  {
    echo "# Made by deploy/kubernetes/render.sh from chart/ with examples/$name.yaml. Set image, config and role to yours."
    helm template esm-poller "$here/chart" -f "$here/examples/$name.yaml" |
      sed -e '/^# Source: /d' -e '/^ *helm\.sh\/chart: /d' -e '/^ *app\.kubernetes\.io\/managed-by: Helm$/d' -e '/^$/d'
  } > "$out/$name.yaml"
done
