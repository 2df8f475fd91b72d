# What the scripts before the blocks share: bash reads it first (BASH_ENV). The variables in the file `environment`, which
# a script may have written, are those of the commands that follow.

# until_is WANTED COMMAND: run the command again until it prints that; two minutes at most.
until_is() {
  local end=$((SECONDS + 120))
  until [ "$(eval "$2")" = "$1" ]; do
    [ "$SECONDS" -lt "$end" ] || { echo "$2 does not print $1" >&2; return 1; }
    sleep 0.2
  done
}

# running RUN NUMBER: wait until so many of the run's pods are running.
running() {
  until_is "$2" "kubectl get pods -l ingestrun.dev/run=$1 --field-selector status.phase=Running -o name | wc -l"
}

# phase RUN PHASE: wait until the run has it.
phase() {
  kubectl wait "ingestrun/$1" --for=jsonpath='{.status.phase}'="$2" --timeout=120s
}

# release RUN: let the run's pods end, which KWOK holds.
release() {
  kubectl annotate pods -l "ingestrun.dev/run=$1" simulate.ingestrun.dev/hold-
}

if [ -e environment ]; then
  set -a
  . ./environment
  set +a
fi
