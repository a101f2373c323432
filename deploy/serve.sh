#!/bin/sh
# The servers as one program in the foreground; ends them when it is told to end.
set -eu
# Compose and Kubernetes give secrets as files; d3po and libpq read the variable.
if [ -r /run/secrets/postgres_password ]; then
    PGPASSWORD=$(cat /run/secrets/postgres_password)
    export PGPASSWORD
fi
trap 'd3po down; exit 0' INT TERM
d3po up "$@"
while :; do
    sleep 3600 &
    wait $!
done
