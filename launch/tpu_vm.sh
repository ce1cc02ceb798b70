#!/usr/bin/env bash
# Runs main.py on a Cloud TPU VM, or on all workers of a pod slice: see usage() below and
# docs/accelerators.md.
#
# A run survives three things in three ways. When main.py dies or a worker reboots, systemd on the
# worker starts it again. When a spot VM is preempted, Google leaves a node behind that can only be
# deleted: `watch`, on a machine that stays up, makes a new one. And main.py itself goes on from its
# newest checkpoint, which is why the workdir has to be in a bucket.
#
# VMs are made by `tpu-vm create`, not as queued resources: one thing to look at and to delete, and
# `watch` asks again where there was no capacity.
#
# It also has to run in the bash 3.2 of macOS: no ${x@Q}, no ${x,,}, and no "${empty[@]}" under -u.
set -euo pipefail

usage() {
  cat <<'USAGE'
Runs main.py on a Cloud TPU VM (v2 to v6e), or on all workers of a pod slice.

  launch/tpu_vm.sh create NAME --zone=ZONE --type=v4-32 [--spot] [--version=VERSION]
  launch/tpu_vm.sh setup  NAME --zone=ZONE
  launch/tpu_vm.sh start  NAME --zone=ZONE -- --config=configs/ensemble4adv.py --workdir=gs://...
  launch/tpu_vm.sh status NAME --zone=ZONE
  launch/tpu_vm.sh logs   NAME --zone=ZONE [-f] [--worker=0]
  launch/tpu_vm.sh stop   NAME --zone=ZONE
  launch/tpu_vm.sh delete NAME --zone=ZONE
  launch/tpu_vm.sh watch  NAME --zone=ZONE --type=v4-32 [--spot] -- --config=... --workdir=gs://...

create  makes the VM
setup   copies this checkout to every worker (with what is not committed yet, without what git
        ignores) and installs Python 3.13, requirements.txt and jax[tpu]. Quick when run again
start   runs "python main.py" with the flags after -- on every worker, again after a crash or a
        reboot, until it is finished, stopped, or ends with exit code 2 (a mistake in the flags)
status  the VM's state, and what the run does on every worker
logs    the last 100 lines of a worker's output; -f follows it
stop    main.py saves a checkpoint and ends; start goes on from there
delete  deletes the VM, and with it all that is not in a bucket
watch   create, setup and start, as far as they are needed, and again each time that the VM is
        preempted. Ends with exit code 0 when the run is finished, 1 when it has failed or was
        stopped. May itself be interrupted and started again, on any machine; the code that it
        copies is that of its own start

  --zone=ZONE       else $TPU_ZONE, else gcloud's own
  --project=ID      else gcloud's own
  --version=VERSION the VM's image; by default the one that Google names for --type
  --create_flag=F   one more flag of "gcloud compute tpus tpu-vm create", as in
                    --create_flag=--network=NETWORK; may be repeated
  --ssh_flag=F      the same for its ssh and scp, as in --ssh_flag=--internal-ip
  --interval=60     seconds between two looks of watch
  --dry_run         prints the gcloud commands and runs none
USAGE
}

# fail CODE MESSAGE: one line, and the end.
fail() {
  printf 'tpu_vm.sh: %s\n' "$2" >&2
  exit "$1"
}

# ---- On the workers. These functions are sent over ssh as text, so they use no variable of this
# script. All is in ~/ensadv: code, venv and run.sh.

# worker_state [SCRIPT]: prints the worker, what its run is doing, and systemd's words for that.
#   running, finished, failed, stopped: the run whose run.sh is SCRIPT (any run without SCRIPT)
#   other: another run is going on    absent: none is
worker_state() {
  local details word
  details=$(systemctl show ensadv \
    --property=ActiveState,ExecMainCode,ExecMainStatus,Result | sort | tr '\n' ' ')
  case $details in
    # activating: also while systemd waits before it starts main.py again.
    *=active\ * | *=activating\ * | *=deactivating\ *) word=running ;;
    *=failed\ *) word=failed ;;
    # ExecMainCode 1: it ended by itself. Of one that never ran all these are 0.
    *ExecMainCode=1\ ExecMainStatus=0\ *) word=finished ;;
    *) word=stopped ;;
  esac
  if [[ ! -f ~/ensadv/run.sh || (-n ${1-} && $(cat ~/ensadv/run.sh) != "$1") ]]; then
    if [[ $word == running ]]; then word=other; else word=absent; fi
  fi
  printf '%s %s %s\n' "$(hostname)" "$word" "$details"
}

worker_setup() {
  case $(worker_state) in
    *' running '* | *' other '*)
      printf '%s: a run is going on, stop it first\n' "$(hostname)" >&2
      return 2
      ;;
  esac
  rm -rf ~/ensadv/code.new
  mkdir -p ~/ensadv/code.new
  tar -xzf ~/ensadv_code.tar.gz -C ~/ensadv/code.new
  rm -rf ~/ensadv/code
  mv ~/ensadv/code.new ~/ensadv/code
  # The images have Python 3.10 and no venv. uv is one program, from PyPI, that brings its own
  # Python. The variable is for images whose pip would refuse; older pips ignore it.
  export PATH="$HOME/.local/bin:$PATH" PIP_BREAK_SYSTEM_PACKAGES=1
  if ! command -v uv >/dev/null; then
    if ! python3 -m pip --version >/dev/null 2>&1; then
      # A new VM installs its updates first, and holds apt's lock meanwhile.
      sudo apt-get -qq -o DPkg::Lock::Timeout=600 update
      sudo apt-get -qq -o DPkg::Lock::Timeout=600 install -y python3-pip
    fi
    python3 -m pip install --quiet --user uv
  fi
  if ! ~/ensadv/venv/bin/python -c '' 2>/dev/null; then
    rm -rf ~/ensadv/venv
    uv venv --quiet --python 3.13 ~/ensadv/venv
  fi
  # Together, so that jax[tpu] is within the range that requirements.txt gives jax.
  uv pip install --quiet --python ~/ensadv/venv/bin/python \
    --requirement ~/ensadv/code/requirements.txt 'jax[tpu]'
  printf '%s: set up\n' "$(hostname)"
}

# worker_start SCRIPT
worker_start() {
  if [[ ! -f ~/ensadv/code/main.py || ! -x ~/ensadv/venv/bin/python ]]; then
    printf '%s: not set up, run setup first\n' "$(hostname)" >&2
    return 2
  fi
  case $(worker_state "$1") in
    *' running '*)
      printf '%s: already running\n' "$(hostname)"
      return
      ;;
    *' other '*)
      printf '%s: another run is going on, stop it first\n' "$(hostname)" >&2
      return 2
      ;;
  esac
  printf '%s\n' "$1" >~/ensadv/run.sh
  # 143: SIGTERM told main.py to end, or killed Python early. After `systemctl stop` that is no
  # failure, and after any other it has to go on. RestartSec: by then all workers have noticed. The
  # limit: a loss that is NaN again each time must not run forever. LimitMEMLOCK: libtpu pins
  # memory, and systemd allows a service less of it than a login.
  sudo tee /etc/systemd/system/ensadv.service >/dev/null <<UNIT
[Unit]
Description=ensadv: main.py
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=6h
StartLimitBurst=10

[Service]
User=$(id -un)
ExecStart=/bin/bash $HOME/ensadv/run.sh
Environment=PYTHONUNBUFFERED=1
Restart=on-failure
RestartSec=60
RestartPreventExitStatus=2
RestartForceExitStatus=143 SIGTERM
SuccessExitStatus=143
TimeoutStopSec=60
LimitMEMLOCK=infinity

[Install]
WantedBy=multi-user.target
UNIT
  sudo systemctl daemon-reload
  sudo systemctl reset-failed ensadv 2>/dev/null || true # says so where nothing has failed
  sudo systemctl enable --quiet --now ensadv
  printf '%s: started\n' "$(hostname)"
}

worker_stop() {
  if [[ $(systemctl show ensadv --property=LoadState) == LoadState=not-found ]]; then
    printf '%s: nothing was started\n' "$(hostname)"
    return
  fi
  sudo systemctl disable --quiet --now ensadv # waits until main.py has ended
  printf '%s: stopped\n' "$(hostname)"
}

# ---- On this machine.

# shown ARG...: prints a command so that a shell would read it back.
shown() {
  local arg
  for arg in "$@"; do
    if [[ ! $arg =~ ^[-A-Za-z0-9_./:=,@+~]+$ ]]; then
      arg="'$(printf '%s' "$arg" | sed "s/'/'\\\\''/g")'"
    fi
    printf '%s ' "$arg"
  done
  printf '\n'
}

# tpu COMMAND ARG...: gcloud compute tpus tpu-vm, in our zone and project. --quiet: it never asks.
tpu() {
  set -- gcloud compute tpus tpu-vm "$@" --zone="$zone" ${project:+"--project=$project"} --quiet
  if [[ $dry_run ]]; then shown "$@"; else "$@"; fi
}

# on_workers WORKER FUNCTION ARG...: calls one of the functions above on WORKER, or on `all`.
on_workers() {
  local script
  script="set -euo pipefail
$(declare -f worker_state "$2")
$2"
  if (($# > 2)); then script+=$(printf ' %q' "${@:3}"); fi
  tpu ssh "$name" --worker="$1" ${ssh_flags[@]+"${ssh_flags[@]}"} --command="$script"
}

create_vm() {
  tpu create "$name" --accelerator-type="$type" --version="$version" ${spot:+--spot} \
    ${create_flags[@]+"${create_flags[@]}"}
}

# Packs the checkout: tracked files as they are now, and new ones that git does not ignore.
pack_code() {
  local root files
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  [[ $dry_run ]] && return
  git -C "$root" rev-parse HEAD >/dev/null 2>&1 ||
    fail 2 "$root: not a git checkout with a commit; its files are what is copied"
  git -C "$root" ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do
      # Deleted, but not committed so: git still lists it.
      if [[ -e $root/$file || -L $root/$file ]]; then printf '%s\0' "$file"; fi
    done >"$temp/files"
  COPYFILE_DISABLE=1 tar -C "$root" --null -czf "$temp/ensadv_code.tar.gz" -T "$temp/files"
  files=$(tr -dc '\0' <"$temp/files" | wc -c)
  say "code: $(git -C "$root" describe --always --dirty), $((files)) files," \
    "$(($(wc -c <"$temp/ensadv_code.tar.gz") / 1024)) KiB packed"
}

copy_and_install() {
  tpu scp "$temp/ensadv_code.tar.gz" "$name:ensadv_code.tar.gz" --worker=all \
    ${ssh_flags[@]+"${ssh_flags[@]}"} && on_workers all worker_setup
}

# Sets vm_state, workers and health. ABSENT: there is no such VM. UNKNOWN: gcloud could not tell.
look_at_vm() {
  local answer
  vm_state=UNKNOWN workers=0 health=
  if answer=$(tpu describe "$name" --format='value(state,networkEndpoints.len(),health)' \
    2>"$temp/errors"); then
    read -r vm_state workers health <<<"$answer"
  elif grep -q NOT_FOUND "$temp/errors"; then
    vm_state=ABSENT
  fi
}

# The line that says what gcloud, whose stderr is in the file, complains about.
gcloud_error() { grep -m 1 ERROR "$temp/errors" || tail -n 1 "$temp/errors"; }

show_status() {
  if [[ $dry_run ]]; then
    tpu describe "$name"
  else
    look_at_vm
    case $vm_state in
      UNKNOWN) fail 1 "$(gcloud_error)" ;;
      ABSENT) fail 1 "there is no VM $name in $zone" ;;
    esac
    printf '%s: %s %s, workers: %s\n' "$name" "$vm_state" "$health" "$workers"
    [[ $vm_state == READY ]] || return 0
  fi
  on_workers all worker_state
}

show_logs() {
  tpu ssh "$name" --worker="$worker" ${ssh_flags[@]+"${ssh_flags[@]}"} \
    --command="sudo journalctl --unit=ensadv --output=cat --no-pager --lines=100$follow"
}

# say WORDS...: a line for who watches; the same line only once.
say() {
  if [[ "$*" != "$last_said" ]]; then printf '%s %s: %s\n' "$(date '+%F %T')" "$name" "$*" >&2; fi
  last_said="$*"
}

# watch_ready: a look at the run on a VM that is there. Returns 0 when the run is finished.
watch_ready() {
  local states count
  # Whoever types watch wants the run to go on, whatever ended it before; later an end is an end.
  local ended=absent
  if [[ $first_look ]]; then ended='absent|stopped|failed'; fi
  # Without those of an unreachable worker, if there is one: gcloud says so and ends with an error.
  states=$(on_workers all worker_state "$run_script" 2>"$temp/errors") || true
  count=$(grep -cE ' (running|finished|failed|stopped|other|absent) ' <<<"$states" || true)
  if ((count < workers)); then
    say "$count of $workers workers answer: $(gcloud_error)"
    return 1
  fi
  first_look=
  if grep -q ' other ' <<<"$states"; then
    fail 2 "$name: another run is going on there; stop it first, or watch it with its own flags"
  elif grep -qE " ($ended) " <<<"$states"; then
    say 'setting up and starting'
    if on_workers all worker_stop && copy_and_install && on_workers all worker_start "$run_script"
    then
      failures=0
    elif ((++failures >= 5)); then
      fail 1 "$name: could not be set up or started, five times"
    fi
    return 1
  elif grep -q ' failed ' <<<"$states"; then
    fail 1 "$name: the run has failed, see logs: $(grep -m 1 ' failed ' <<<"$states")"
  elif grep -q ' stopped ' <<<"$states"; then
    fail 1 "$name: the run was stopped"
  elif grep -q ' running ' <<<"$states"; then
    say 'running'
    return 1
  fi
}

watch_run() {
  local first_look=1 answered='' failures=0
  if [[ $dry_run ]]; then
    create_vm && copy_and_install && on_workers all worker_start "$run_script"
    return
  fi
  while true; do
    look_at_vm
    case $vm_state in
      READY)
        if watch_ready; then break; fi
        ;;
      ABSENT)
        say 'creating the VM'
        failures=0
        if ! create_vm >/dev/null 2>"$temp/errors"; then
          if grep -qE 'INVALID_ARGUMENT|NOT_FOUND|PERMISSION_DENIED|UNAUTHENTICATED' \
            "$temp/errors"; then
            fail 2 "$(gcloud_error)"
          fi
          say "no VM yet: $(gcloud_error)"
        fi
        ;;
      PREEMPTED | TERMINATED)
        say "$vm_state, deleting the VM"
        tpu delete "$name" >/dev/null 2>"$temp/errors" || say "$(gcloud_error)"
        ;;
      UNKNOWN)
        # Not signed in, for instance. Later it is the network, and passes.
        [[ $answered ]] || fail 1 "$(gcloud_error)"
        say "$(gcloud_error)"
        ;;
      *) say "$vm_state" ;;
    esac
    [[ $vm_state == UNKNOWN ]] || answered=1
    sleep "$interval"
  done
  say 'finished'
}

# Google's table "TPU software versions", for JAX.
default_version() {
  case $type in
    v6e-*) printf 'v2-alpha-tpuv6e' ;;
    v5p-*) printf 'v2-alpha-tpuv5' ;;
    v5litepod-*) printf 'v2-alpha-tpuv5-lite' ;;
    *) printf 'tpu-ubuntu2204-base' ;;
  esac
}

# run_sh FLAG...: checks main.py's flags and prints the script that every worker runs.
run_sh() {
  local workdir='' previous='' arg
  for arg in "$@"; do
    case $arg in --workdir=* | -workdir=*) workdir=${arg#*=} ;; esac
    case $previous in --workdir | -workdir) workdir=$arg ;; esac
    previous=$arg
  done
  [[ $workdir ]] || fail 2 '--workdir: needed among the flags after --, as in --workdir=gs://BUCKET/run'
  [[ $workdir == gs://?* ]] ||
    fail 2 "--workdir: found $workdir, allowed is gs://...; a VM's disk is lost with the VM"
  # SC2016: the worker expands $HOME. exec: SIGTERM has to reach Python.
  # shellcheck disable=SC2016
  printf 'cd "$HOME/ensadv/code" || exit 1\nexec "$HOME/ensadv/venv/bin/python" main.py'
  printf ' %q' "$@"
}

main() {
  local commands='create setup start status logs stop delete watch'
  local command=${1-} name='' zone='' project='' type='' version='' spot='' worker=0 follow=''
  local interval=60 dry_run='' create_flags ssh_flags main_flags run_script=''
  local vm_state workers health last_said='' temp=''
  create_flags=() ssh_flags=() main_flags=()
  case $command in -h | --help | help) usage && exit ;; esac
  [[ $command && " $commands " == *" $command "* ]] ||
    fail 2 "command: found '$command', allowed are ${commands// /, }; --help explains them"
  shift
  while (($#)); do
    case $1 in
      # As gcloud takes them, with a space.
      --zone | --project | --type | --version | --worker | --interval | --create_flag | --ssh_flag)
        (($# > 1)) || fail 2 "$1: needs a value"
        set -- "$1=$2" "${@:3}"
        continue
        ;;
      --zone=*) zone=${1#*=} ;;
      --project=*) project=${1#*=} ;;
      --type=*) type=${1#*=} ;;
      --version=*) version=${1#*=} ;;
      --worker=*) worker=${1#*=} ;;
      --interval=*) interval=${1#*=} ;;
      --create_flag=*) create_flags+=("${1#*=}") ;;
      --ssh_flag=*) ssh_flags+=("${1#*=}") ;;
      --spot) spot=1 ;;
      --dry_run) dry_run=1 ;;
      -f | --follow) follow=' --follow' ;;
      -h | --help) usage && exit ;;
      --)
        main_flags=("${@:2}")
        [[ $command == start || $command == watch ]] ||
          fail 2 "--: only start and watch take main.py's flags, found $command"
        break
        ;;
      -*) fail 2 "unknown flag $1; --help lists them, and main.py's come after --" ;;
      *)
        [[ ! $name ]] || fail 2 "one NAME at a time, found $name and $1"
        name=$1
        ;;
    esac
    shift
  done
  [[ $name =~ ^[a-z][-a-z0-9]*$ ]] ||
    fail 2 "NAME: needed, the VM's, in lower-case letters, digits and -; found '$name'"
  [[ $interval =~ ^[0-9]+$ ]] || fail 2 "--interval: found $interval, expected seconds"
  [[ $worker =~ ^([0-9]+|all)$ ]] || fail 2 "--worker: found $worker, expected a number or all"
  if [[ $command == create || $command == watch ]]; then
    [[ $type ]] || fail 2 "--type: needed, as in --type=v4-32"
    version=${version:-$(default_version)}
  fi
  if [[ $command == start || $command == watch ]]; then
    run_script=$(run_sh ${main_flags[@]+"${main_flags[@]}"})
  fi
  command -v gcloud >/dev/null || fail 2 'gcloud: not found; install the Google Cloud CLI'
  zone=${zone:-${TPU_ZONE:-$(gcloud config get-value compute/zone 2>/dev/null || true)}}
  [[ $zone ]] || fail 2 '--zone: needed, as in --zone=us-central2-b'
  temp=$(mktemp -d)
  # shellcheck disable=SC2064 # now: a local is gone when the trap is called
  trap "rm -rf '$temp'" EXIT
  if [[ $command == setup || $command == watch ]]; then pack_code; fi
  case $command in
    create) create_vm ;;
    setup) copy_and_install ;;
    start) on_workers all worker_start "$run_script" ;;
    status) show_status ;;
    logs) show_logs ;;
    stop) on_workers all worker_stop ;;
    delete) tpu delete "$name" ;;
    watch) watch_run ;;
  esac
}

main "$@"
