#!/bin/sh
# /// script
# [tool.bgtasks]
# description = "Fail while a disk is nearly full"
# schedule = "every 15 min"
# timeout = "1 min"
# options = { min_free_percent = 5, paths = "" }
# ///
#
# A task in shell: settings come as BGTASKS_OPTION_..., what it has to say goes to $BGTASKS_REPORT,
# and the exit code says how it went. `paths`: more places to look at, separated by blanks.

set -u
lowest=100
full=""

# shellcheck disable=SC2086 # `paths` is a list
for path in "$BGTASKS_STATE_DIR" $BGTASKS_OPTION_PATHS; do
    used=$(df -P -- "$path" | awk 'NR == 2 { sub(/%/, "", $5); print $5 }')
    free=$((100 - ${used:-100}))
    echo "$path: $free % free"
    [ "$free" -lt "$lowest" ] && lowest=$free
    [ "$free" -lt "$BGTASKS_OPTION_MIN_FREE_PERCENT" ] && full="$full $path"
done

echo "message=least free: $lowest %" >>"$BGTASKS_REPORT"
if [ -n "$full" ]; then
    echo "less than $BGTASKS_OPTION_MIN_FREE_PERCENT % free:$full" >&2
    exit 1
fi
