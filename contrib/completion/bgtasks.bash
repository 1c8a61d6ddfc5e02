# Completion for bash: the commands of bgtasks, their flags, the settings, and the names of tasks.
# To install it, put this line into ~/.bashrc with the path of this file, and open a new shell:
#     . /path/to/contrib/completion/bgtasks.bash
# It serves bgtasks, bgtasks.py, ./bgtasks.py and a full path. The names are those that
# `status --json` of that very program knows; asking for it changes nothing and runs no task.

# Set `own` to the flags of a command, and `takes` to what its words are.
_bgtasks_command() {
    own= takes=
    case $1 in
        admin) own="--json" takes=action ;;
        check) own="--json" ;;
        clear) own="--all" takes=task ;;
        doctor) own="--json" ;;
        explain) own="--at --json" takes=task ;;
        history) own="--count --json" takes=task ;;
        install) own="--write" ;;
        kill) takes=task ;;
        lint) own="--json" takes=file ;;
        log) own="--follow --json" takes=task ;;
        metrics) own="--json" ;;
        new) own="--language" takes=name ;;
        next) own="--from --count --timezone --json" takes=task ;;
        pause) own="--all --for --note" takes=task ;;
        request) own="--all" takes=task ;;
        resume) own="--all" takes=task ;;
        run) own="--force" takes=task ;;
        sendmail) own="--now" ;;
        show) own="--json" takes=task ;;
        status) own="--json --watch" ;;
    esac
}

# Print each "name" or "group" of the tasks: KEY PROGRAM [--SETTING=VALUE ...]. What has characters
# that a shell would read is left out.
_bgtasks_ask() {
    local key=$1
    shift
    "$@" status --json 2>/dev/null </dev/null | awk -F '"' -v key="$key" '
        /^      "/ { row[$2] = $4 }
        /^    }/ && row["state"] != "ignored" {
            if (row[key] ~ /^[A-Za-z0-9_.-]+$/ && !seen[row[key]]++) print row[key]
        }'
}

# Offer those words that begin with what was typed. (compgen -W would run what stands in them.)
_bgtasks_offer() {
    local word
    for word in "$@"; do
        [[ $word == "$typed"* ]] && COMPREPLY+=("$before$word")
    done
}

# Offer files (-f) or folders (-d).
_bgtasks_offer_paths() {
    local path
    while IFS= read -r path; do
        COMPREPLY+=("$before$path")
    done < <(compgen "$1" -- "${typed//[\\\"\']/}")
    compopt -o filenames 2>/dev/null
}

# Offer the values of a flag or setting.
_bgtasks_offer_values() {
    case $1 in
        --task | --exclude_task | --group | --exclude_group | --param_file)
            # several, with commas between them
            [[ $typed == *,* ]] && before+=${typed%,*}, typed=${typed##*,}
            ;;
    esac
    case $1 in
        --language) _bgtasks_offer python sh perl php ruby toml ;;
        --task | --exclude_task) _bgtasks_offer $(_bgtasks_ask name "${ask[@]}") ;;
        --group | --exclude_group) _bgtasks_offer $(_bgtasks_ask group "${ask[@]}") ;;
        --verbose | --status_only | --dry_run | --strict | --email_asynchronous | --web_allow_get \
            | --web_pixel | --web_inline)
            _bgtasks_offer 0 1
            ;;
        --smtp_security) _bgtasks_offer starttls tls none ;;
        --param_file | --maintenance_flag | --smtp_ca_file | --sendmail_path)
            _bgtasks_offer_paths -f
            ;;
        --tasks_dir | --state_dir | --outbox) _bgtasks_offer_paths -d ;;
    esac
}

_bgtasks() {
    local IFS=$' \t\n'
    local commands="admin check clear doctor explain history install kill lint log metrics new next
        pause request resume run sendmail show status"
    local settings="--param_file= --auth_user= --auth_pwd= --verbose --status_only --dry_run
        --cron_max_execution_time= --cron_sleep= --cron_limit= --max_parallel= --tasks_dir=
        --state_dir= --maintenance_flag= --strict --max_interruptions=
        --history_success_lifetime= --history_failure_lifetime= --node= --timezone=
        --notify_email= --notify_on= --notify_after= --notify_command= --email_asynchronous
        --outbox= --outbox_delay= --mail_from= --smtp_host= --smtp_port= --smtp_security=
        --smtp_user= --smtp_pwd= --smtp_ca_file= --sendmail_path=
        --web_token= --web_allow_get --web_pixel --web_interval= --web_inline
        --web_max_execution_time=
        --task= --exclude_task= --group= --exclude_group="
    local with_value=" --at --count --for --from --language --note --timezone "
    local own= takes= before= typed= command= waiting= glue= i part
    local -a words=() given=() ask=()
    COMPREPLY=()

    # bash takes --task=a for three words; make it one again
    for ((i = 0; i <= COMP_CWORD; i++)); do
        part=${COMP_WORDS[i]}
        if [[ -n $part && $part != *[!=:]* ]]; then
            glue=1
        elif [[ $glue ]]; then
            glue=
        else
            words+=("$part")
            continue
        fi
        words[${#words[@]} - 1]+=$part
    done
    typed=${words[${#words[@]} - 1]}

    part=${words[0]//[\\\"\']/}
    [[ $part == "~/"* ]] && part=$HOME/${part:2}
    ask=("$part")
    for ((i = 1; i < ${#words[@]} - 1; i++)); do
        part=${words[i]}
        if [[ $waiting ]]; then
            waiting=
        elif [[ $part == --param_file=* || $part == --tasks_dir=* || $part == --state_dir=* ]]; then
            ask+=("${part//[\\\"\']/}")
        elif [[ $part == --* ]]; then
            [[ " $own " == *" $part "* && $with_value == *" $part "* ]] && waiting=$part
        elif [[ $command ]]; then
            given+=("$part")
        else
            command=$part
            _bgtasks_command "$command"
        fi
    done

    if [[ $waiting ]]; then
        _bgtasks_offer_values "$waiting"
    elif [[ $typed == --*=* ]]; then
        part=${typed%%=*}
        # bash replaces only what stands behind the =, unless it was told not to split there
        [[ $COMP_WORDBREAKS == *=* ]] || before=$part=
        typed=${typed#*=}
        _bgtasks_offer_values "$part"
    elif [[ $typed == -* ]]; then
        [[ $command == next ]] && settings=${settings/--timezone=/}
        _bgtasks_offer $own $settings --help --version
    elif [[ -z $command ]]; then
        _bgtasks_offer $commands
    elif [[ $takes == action && ${#given[@]} == 0 ]]; then
        _bgtasks_offer add remove list
    elif [[ $takes == file && ${#given[@]} == 0 ]]; then
        _bgtasks_offer_paths -f
    elif [[ $takes == task && ${#given[@]} == 0 ]]; then
        _bgtasks_offer $(_bgtasks_ask name "${ask[@]}")
    elif [[ $takes != name || ${#given[@]} != 0 ]]; then
        _bgtasks_offer $own
    fi
    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]]; then
        compopt -o nospace 2>/dev/null
    fi
    return 0
}

complete -F _bgtasks bgtasks bgtasks.py
