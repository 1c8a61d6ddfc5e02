#!/bin/sh
# /// script
# [tool.bgtasks]
# description = "Fail while another version of a file lies at its URL"
# schedule = "daily 07:10"
# timeout = "5 min"
# retries = 1
#
# [tool.bgtasks.options]
# url = ""               # https://example.org/bgtasks.py
# file = ""              # /srv/app/bgtasks.py: what is installed here
# ca_file = ""           # certificate of a private CA; empty: those that this machine trusts
# ///
#
# A template: it compares what lies at a URL with what is installed, and fails while they differ, so
# that you hear of it once. It installs nothing: look at what changed, and then do it yourself.
# What was downloaded once is not again until its ETag changes. Needs curl.

set -u
url=${BGTASKS_OPTION_URL:-}
file=${BGTASKS_OPTION_FILE:-}
ca_file=${BGTASKS_OPTION_CA_FILE:-}
most=100000000 # bytes
LC_ALL=C
export LC_ALL

fail() {
    echo "$1" >&2
    exit 1
}

case $url in
    "") fail "options.url: is empty; set where new versions appear" ;;
    *[!!-~]* | *[\"\\]*) fail "options.url: must hold no blank, quote or backslash" ;;
    http://?* | https://?*) ;;
    *) fail "options.url: must begin with https:// or http://" ;;
esac
[ -n "$file" ] || fail "options.file: is empty; name the file that is installed here"
[ -d "$file" ] && fail "options.file: $file is a folder; name a file"
[ -r "$file" ] || fail "options.file: $file cannot be read; mend the path"
[ -z "$ca_file" ] || [ -r "$ca_file" ] || fail "options.ca_file: cannot be read; mend the path"
command -v curl >/dev/null || fail "needs curl; install it"

sum() {
    if command -v sha256sum >/dev/null; then
        sha256sum
    else
        shasum -a 256
    fi | cut -d ' ' -f 1
}

# remembered KEY: what the last run put into the state; it stands last in the input
remembered() {
    sed -n 's/.*"state": {[^}]*"'"$1"'": "\([^"]*\)".*/\1/p' "$BGTASKS_INPUT"
}

work=$(mktemp -d) || fail "no folder for the download could be made; is the disk full?"
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
ulimit -f $((most / 512)) # not every curl knows the size before it has it all

here=$(printf '%s' "$url" | sum)
etag="" there=""
if [ "$(remembered url)" = "$here" ]; then
    etag=$(remembered etag)
    there=$(remembered sha256)
fi

{
    printf 'url = "%s"\n' "$url"
    case $etag in
        "") ;;
        W/*) printf 'header = "If-None-Match: W/\\"%s\\""\n' "${etag#W/}" ;;
        *) printf 'header = "If-None-Match: \\"%s\\""\n' "$etag" ;;
    esac
} >"$work/config"
code=$(curl -q --silent --show-error --fail --globoff --location --max-redirs 5 --max-time 120 \
    --proto "=${url%%:*},https" --max-filesize "$most" ${ca_file:+--cacert "$ca_file"} \
    --dump-header "$work/head" --output "$work/body" --write-out '%{http_code}' \
    --config "$work/config") || fail "$url cannot be read (curl ended with $?)"

case $code in
    304) ;;
    200)
        there=$(sum <"$work/body")
        # that of the last answer, not of a redirect; and only the plain characters that servers use
        etag=$(tr -d '\r' <"$work/head" |
            sed -n -e 's/^HTTP\/.*//p' \
                -e 's/^[Ee][Tt][Aa][Gg]: *\(W\/\)\{0,1\}"\([A-Za-z0-9_.:+=-]\{1,200\}\)"$/\1\2/p' |
            tail -n 1)
        ;;
    *) fail "$url answered $code" ;;
esac
printf 'state={"url": "%s", "etag": "%s", "sha256": "%s"}\n' "$here" "$etag" "$there" >>"$BGTASKS_REPORT"

if [ "$there" != "$(sum <"$file")" ]; then
    fail "another version than $file lies at $url; look at it, and install it"
fi
echo "message=$file is what lies at $url" >>"$BGTASKS_REPORT"
