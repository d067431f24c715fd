"""Copies a sidecar's configuration, with the region of the node that this pod is on.

python region.py FROM TO: the node is $NODE_NAME; its label topology.kubernetes.io/region is asked of the API server.
"""

import json
import os
import ssl
import sys
import urllib.request
from pathlib import Path

import yaml

LABEL = "topology.kubernetes.io/region"
ACCOUNT = Path(os.environ.get("SERVICE_ACCOUNT", "/var/run/secrets/kubernetes.io/serviceaccount"))

host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
if ":" in host:
    host = f"[{host}]"
request = urllib.request.Request(
    f"https://{host}:{port}/api/v1/nodes/{os.environ['NODE_NAME']}",
    headers={"Authorization": f"Bearer {(ACCOUNT / 'token').read_text()}"},
)
context = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
with opener.open(request, timeout=10) as response:
    labels = json.load(response)["metadata"].get("labels", {})
if LABEL not in labels:
    sys.exit(f"node {os.environ['NODE_NAME']} has no label {LABEL}; set the chart's value `region`")

config = yaml.safe_load(Path(sys.argv[1]).read_text()) or {}
config.setdefault("node", {})["region"] = labels[LABEL]
Path(sys.argv[2]).write_text(yaml.safe_dump(config))
