#!/bin/sh
# /// script
# [tool.bgtasks]
# description = "Back up databases of MySQL, MariaDB or PostgreSQL"
# schedule = "daily 02:00"
# timeout = "6 h"
# nice = 10
#
# [tool.bgtasks.options]
# server = "mysql"       # or "mariadb" or "postgresql"
# databases = ""         # their names, separated by blanks
# defaults_file = ""     # [client], then host=, user= and password= without blanks; chmod 600
# target = ""            # folder for the dumps; it must be there
# keep = 7               # so many of the newest dumps of each database stay
# min_free_mib = 1024    # so much stays free on the disk of the target
# ///
#
# Copy or link this file into tasks.d, and set the options. The password stands only in the file that
# defaults_file names: never in an argument or the environment, where others may see it.
#
# A dump gets its name only when the dump program and gzip both succeeded and what was written could be
# read back up to the line that ends each dump. If one database fails the others are still dumped, and
# the run fails at its end. Old dumps are removed only after a new one of the same database is there.

set -u
umask 077
LC_ALL=C
export LC_ALL
server=${BGTASKS_OPTION_SERVER-mysql} # a .toml may leave options out
databases=${BGTASKS_OPTION_DATABASES-}
defaults=${BGTASKS_OPTION_DEFAULTS_FILE-}
target=${BGTASKS_OPTION_TARGET-}
keep=${BGTASKS_OPTION_KEEP-7}
min_free_mib=${BGTASKS_OPTION_MIN_FREE_MIB-1024}
part=$target/.$BGTASKS_TASK.part

refuse() {
    echo "$*" >&2
    exit 1
}

report() {
    echo "$1" >>"$BGTASKS_REPORT"
}

# --- options

need_number() {
    case $2 in
        '' | *[!0-9]* | ?????????*) refuse "options.$1: must be a whole number, not $2" ;;
    esac
}

need_names() {
    [ $# -gt 0 ] || refuse "options.databases: is empty; name the databases, separated by blanks"
    for name; do
        case $name in
            -* | .* | *[!A-Za-z0-9_.-]*)
                refuse "options.databases: $name has other characters than letters, digits, _ . and -"
                ;;
        esac
    done
}

need_private_file() {
    [ -n "$1" ] || refuse "options.defaults_file: is empty; name the file with user and password"
    [ -f "$1" ] || refuse "options.defaults_file: $1 is no file"
    [ -r "$1" ] || refuse "options.defaults_file: $1 cannot be read; give it to who runs this"
    case $(ls -ldL -- "$1") in
        -??-------*) ;;
        *) refuse "options.defaults_file: $1 can be read by others; chmod 600 it" ;;
    esac
}

need_folder() {
    case $1 in
        /*) ;;
        *) refuse "options.target: must be a path from the root on" ;;
    esac
    [ -d "$1" ] || refuse "options.target: $1 is no folder; mount its disk, or mkdir -m 700 it"
    [ -w "$1" ] || refuse "options.target: $1 cannot be written to"
}

# Another installation would write to the same files, and remove our dumps.
need_own_target() {
    owner=$BGTASKS_NODE:$BGTASKS_STATE_DIR
    mark=$target/.$BGTASKS_TASK.owner
    [ -s "$mark" ] || echo "$owner" >"$mark" || refuse "options.target: $target cannot be written to"
    [ "$(cat "$mark")" = "$owner" ] ||
        refuse "$mark: is of $(cat "$mark"); give each installation a target of its own, or remove this file"
}

# Print the first of these programs that there is.
program() {
    for name; do
        command -v "$name" && return
    done
    refuse "options.server: $server needs $1, which is not installed or not in PATH"
}

# --- one database

# Print a dump of a database. A server that does not answer is an error, not a question.
dump_mysql() {
    # shellcheck disable=SC2086 # an option or none
    "$dumper" --defaults-file="$defaults" --single-transaction --quick --routines --events \
        --triggers --hex-blob --no-tablespaces --default-character-set=utf8mb4 $only_mysql -- "$1"
}

dump_postgresql() {
    PGSERVICEFILE=$defaults PGSERVICE=client PGCONNECT_TIMEOUT=30 \
        "$dumper" --no-password --lock-wait-timeout=600000 --encoding=UTF8 --dbname="$1"
}

free_kib() {
    df -Pk -- "$target" | awk 'NR == 2 { print $4 }'
}

# Dump a database into $part. Of a pipe sh tells only how its last program ended, so that is written
# down for each. The limit keeps a dump from filling the disk.
dump() {
    room=$(($(free_kib) - min_free_mib * 1024))
    if [ "$room" -le 0 ]; then
        echo "$1: less than $min_free_mib MiB (min_free_mib) are free in $target" >&2
        return 1
    fi
    ended=$(
        {
            {
                "dump_$kind" "$1" 3>&-
                echo $? >&3
            } | {
                ulimit -f $((room * 2))
                exec gzip -c >"$part" 3>&-
            } || echo "gzip failed" >&3
        } 3>&1
    )
    [ "$ended" = 0 ] || echo "$1: the dump failed ($(echo "$ended" | tr '\n' ' '))" >&2
    [ "$ended" = 0 ]
}

# The last lines of a dump say that it is complete.
verify() {
    if ! gzip -t "$part" || ! gzip -dc "$part" | tail -n 8 | grep -q '^-- .*ump complete'; then
        echo "$1: the dump is not complete, or cannot be read back" >&2
        return 1
    fi
}

publish() {
    made=$target/$BGTASKS_TASK.$1-$(date -u +%Y%m%dT%H%M%SZ).sql.gz
    sync -- "$part" 2>/dev/null || sync # some know no files
    mv -- "$part" "$made"
}

rotate() {
    name=$target/$BGTASKS_TASK.$1
    set -- "$name"-[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9]T[0-9][0-9][0-9][0-9][0-9][0-9]Z.sql.gz
    while [ $# -gt "$keep" ]; do
        [ "$1" = "$made" ] || rm -f -- "$1"
        shift
    done
}

back_up() {
    dump "$1" && verify "$1" && publish "$1" && rotate "$1"
}

# --- all of them

# What the deadline left over stands in the state; it is taken out at once, so that the next run
# dumps all databases if this one is killed.
left_over() {
    sed -n 's/.*"left": *"\([^"]*\)".*/\1/p' "$BGTASKS_INPUT"
    report 'state={}'
}

need_number keep "$keep"
need_number min_free_mib "$min_free_mib"
[ "$keep" -gt 0 ] || refuse "options.keep: must be at least 1"
set -f
# shellcheck disable=SC2086 # a list
need_names $databases
need_private_file "$defaults"
need_folder "$target"
case $server in
    mysql) kind=mysql dumper=$(program mysqldump mariadb-dump) || exit 1 ;;
    mariadb) kind=mysql dumper=$(program mariadb-dump mysqldump) || exit 1 ;;
    postgresql) kind=postgresql dumper=$(program pg_dump) || exit 1 ;;
    *) refuse 'options.server: must be "mysql", "mariadb" or "postgresql"' ;;
esac
only_mysql=
if [ "$server" = mysql ]; then
    case $("$dumper" --version) in
        *MariaDB*) ;;
        *) only_mysql=--set-gtid-purged=OFF ;; # else only an empty server takes the dump
    esac
fi
need_own_target
left=$(left_over)
# shellcheck disable=SC2086 # a list
set -- ${left:-$databases}
set +f
left=""

trap 'rm -f -- "$part"' EXIT
trap 'exit 143' TERM
failed=""
number=0
dumped=0
all=$#
while [ $# -gt 0 ]; do
    if [ "$(date +%s)" -ge "$BGTASKS_DEADLINE" ] && [ "$number" -gt 0 ]; then
        left=$*
        break
    fi
    if back_up "$1"; then
        dumped=$((dumped + 1))
        report "volume=$dumped"
    else
        failed="$failed $1"
    fi
    number=$((number + 1))
    report "progress=$number/$all"
    shift
done
[ -z "$failed" ] || refuse "not backed up:$failed"
if [ -n "$left" ]; then
    report "state={\"left\": \"$left\"}"
    report "result=more"
fi
report "message=$number of $all dumped"
