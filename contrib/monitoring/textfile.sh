#!/bin/sh
# Write what Prometheus' node_exporter shows of bgtasks: textfile.sh [PROGRAM [FOLDER [USER]]]
# The exporter needs --collector.textfile.directory=FOLDER (Debian's has it). As root run a copy that only root can
# write, as bgtasks-metrics.service does.
set -eu
program=${1:-/srv/app/bgtasks.py}
folder=${2:-/var/lib/prometheus/node-exporter}
user=${3:-www-data}

# The folder is root's, but only the owner of the state may read it.
as_owner() {
    if [ "$(id -u)" = 0 ]; then
        setpriv --reuid="$user" --regid="$user" --init-groups "$@"
    else
        "$@"
    fi
}

# The exporter must never read half a file, and no old figures as if they were new ones: on an error the old
# file stays, and its age (node_textfile_mtime_seconds) tells.
unfinished=$(mktemp "$folder/.bgtasks.XXXXXX")
trap 'rm -f "$unfinished"' EXIT
as_owner /usr/bin/python3 "$program" metrics >"$unfinished"
chmod 644 "$unfinished"
mv "$unfinished" "$folder/bgtasks.prom"
