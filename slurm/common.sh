# What the scripts beside this one share: where things are, and what the site says.
# shellcheck shell=bash
set -euo pipefail

# A running job sees a copy of its script elsewhere, and is told by submit.sh where the original stands.
DALLE_ROOT=${DALLE_ROOT:-$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
DALLE_SITE=${DALLE_SITE:-$DALLE_ROOT/slurm/site.sh}
DALLE_LOGS=${DALLE_LOGS:-$PWD/logs}
export DALLE_ROOT DALLE_SITE DALLE_LOGS

fail() {
    echo "error: $*" >&2
    exit 1
}

[[ -f $DALLE_SITE ]] || fail "DALLE_SITE=$DALLE_SITE does not exist: name a copy of slurm/site.sh"
# shellcheck source=site.sh
source "$DALLE_SITE"
