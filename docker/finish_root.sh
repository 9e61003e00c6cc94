#!/bin/sh
# Add EdgeLM's commands, and check that the libraries of the image are whole.
# usage: finish_root.sh DIRECTORY
set -eu
root=$1

cat > "$root/usr/local/bin/edgelm" <<'PYTHON'
#!/usr/bin/python3 -s
from edgelm.cli.app import main

main()
PYTHON
cat > "$root/usr/local/bin/edgelm-health" <<'PYTHON'
#!/usr/bin/python3
"""Exit 0 when the server in this container is alive. Liveness needs no key and answers while the engine is busy."""
import http.client

connection = http.client.HTTPConnection("127.0.0.1", 8080, timeout=8)
connection.request("GET", "/health/live")
raise SystemExit(connection.getresponse().status != 200)
PYTHON
chmod 755 "$root/usr/local/bin/edgelm" "$root/usr/local/bin/edgelm-health"
