#!/bin/sh
# /// script
# [tool.bgtasks]
# description = "Fail while a disk is nearly full, or has hardly any room for more files"
# schedule = "every 15 min"
# timeout = "1 min"
#
# [tool.bgtasks.options]
# min_free_percent = 5
# min_free_inodes_percent = 5
# paths = ""               # more places to look at, separated by blanks
# limits = ""              # "/srv=10%, /var/backups=20G": what must be free there instead
# ///
#
# Takes the place of the shipped tasks.d/disk_space.sh, and knows its options: copy it over that one.
# It adds inodes (a disk may have room, but not for one more file) and a limit of its own for a place.

set -u
set -f # what looks like a pattern is a name

percent=${BGTASKS_OPTION_MIN_FREE_PERCENT:-5}
inodes=${BGTASKS_OPTION_MIN_FREE_INODES_PERCENT:-5}
least=100
problems=""

refuse() {
    echo "options.$1: $2" >&2
    exit 1
}

for option in "min_free_percent $percent" "min_free_inodes_percent $inodes"; do
    case ${option#* } in
        "" | *[!0-9]*) refuse "${option%% *}" "must be a whole number, such as 5" ;;
    esac
done

# What is used or free, and what is free, in kB or (-i) in inodes: what is kept for root is neither.
# Names may hold blanks, so columns are counted from the percentage; a file system without inodes
# shows none.
sizes() {
    df -P "$1" -- "$2" | awk 'NR > 1 {
        for (i = 4; i <= NF; i++)
            if ($i ~ /^[0-9]+%$/) { printf "%.0f %.0f\n", $(i - 2) + $(i - 1), $(i - 1); exit }
    }'
}

complain() {
    echo "$1" >&2
    problems="$problems; $1"
}

# check PATH LIMIT: the limit is a percentage, or kB
check() {
    space=$(sizes -k "$1")
    if [ -z "$space" ]; then
        complain "$1: cannot be asked; mend the path"
        return
    fi
    free=$(echo "$space" | awk '{ print int($1 ? $2 * 100 / $1 : 100) }')
    echo "$1: $free % free"
    [ "$free" -lt "$least" ] && least=$free
    if echo "$space" | awk -v limit="$2" '{
        exit !(limit ~ /%$/ ? $2 * 100 < $1 * (limit + 0) : $2 < limit + 0)
    }'; then
        complain "less than ${3:-$2} free: $1"
    fi
    room=$(sizes -i "$1" | awk '{ print int($1 ? $2 * 100 / $1 : 100) }')
    if [ -n "$room" ] && [ "$room" -lt "$inodes" ]; then
        complain "less than $inodes % of the inodes free: $1"
    fi
}

# kilobytes 20G: the number that df shows, or nothing
kilobytes() {
    echo "$1" | awk '/^[0-9]+[KMGT]$/ {
        n = substr($0, 1, length($0) - 1)
        for (i = index("KMGT", substr($0, length($0))); i > 1; i--) n *= 1024 # busybox has no ^
        printf "%.0f", n
    }'
}

# shellcheck disable=SC2086 # `paths` is a list
for path in "$BGTASKS_STATE_DIR" ${BGTASKS_OPTION_PATHS:-}; do
    check "$path" "$percent%" "$percent %"
done

blank=' '
IFS=,
for limit in ${BGTASKS_OPTION_LIMITS:-}; do
    unset IFS
    limit=${limit#"${limit%%[!"$blank"]*}"}
    limit=${limit%"${limit##*[!"$blank"]}"}
    path=${limit%=*}
    wanted=${limit##*=}
    case $wanted in
        [0-9]% | [0-9][0-9]%) least_there=$wanted ;;
        *) least_there=$(kilobytes "$wanted") ;;
    esac
    if [ -z "$least_there" ] || [ "$path" = "$limit" ] || [ -z "$path" ]; then
        refuse limits "'$limit' must be written as /srv=10% or /srv=20G (K, M, G, T)"
    fi
    check "$path" "$least_there" "$wanted"
done

echo "message=least free: $least %" >>"$BGTASKS_REPORT"
[ -z "$problems" ] || exit 1
