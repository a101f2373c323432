#!/bin/sh
# The servers as one program in the foreground; ends them when it is told to end.
set -eu
trap 'd3po down; exit 0' INT TERM
d3po up "$@"
while :; do
    sleep 3600 &
    wait $!
done
