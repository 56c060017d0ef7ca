#!/usr/bin/env bash
# A whole Slurm on this machine for tests: munge, a controller and some nodes, all in one folder, as root.
#
#   eval "$(scripts/slurm_local.sh start)"     # prints `export SLURM_CONF=...`, which Slurm's commands then use
#   pytest -m slurm
#   scripts/slurm_local.sh stop
#
# Needs Debian's packages slurmctld, slurmd, slurm-client and munge. CLRUN_SLURM is the folder (default
# /tmp/clrun-slurm), CLRUN_SLURM_NODES the number of nodes (default 2, each with 2 places for jobs). Nothing of the system's
# own Slurm or munge is used or changed.
set -euo pipefail

dir="${CLRUN_SLURM:-/tmp/clrun-slurm}"
nodes="${CLRUN_SLURM_NODES:-2}"
host=$(hostname -s)
export SLURM_CONF="$dir/slurm.conf"

fail() {
  echo "slurm_local.sh: $*" >&2
  exit 2
}

needed() {
  local name
  [ "$(id -u)" = 0 ] || fail "needs root, because slurmd starts the jobs of all users"
  for name in munged slurmctld slurmd sinfo; do
    PATH="$PATH:/usr/sbin" command -v "$name" >/dev/null ||
      fail "there is no $name; install slurmctld slurmd slurm-client munge"
  done
}

configure() {
  mkdir -p "$dir/state"
  chmod 755 "$dir"
  [ -e "$dir/munge.key" ] || (umask 077 && head -c 256 /dev/urandom >"$dir/munge.key")
  printf 'CgroupAutomount=no\n' >"$dir/cgroup.conf"
  cat >"$SLURM_CONF" <<CONF
ClusterName=clrun
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmctldPort=27817
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmdLogFile=$dir/slurmd.%n.log
SlurmdSpoolDir=$dir/spool.%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobRequeue=1
ReturnToService=2
KillWait=20
SlurmdTimeout=20
MinJobAge=86400
SchedulerParameters=batch_sched_delay=1,sched_min_interval=100000
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=node[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[27901-$((27900 + nodes))] CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

start() {
  needed
  if sinfo >/dev/null 2>&1; then
    fail "Slurm runs in $dir already; scripts/slurm_local.sh stop ends it"
  fi
  configure
  export PATH="$PATH:/usr/sbin"
  munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munge.pid" \
    --log-file="$dir/munge.log" --seed-file="$dir/munge.seed" >&2
  slurmctld >&2
  for number in $(seq "$nodes"); do
    mkdir -p "$dir/spool.node$number"
    slurmd -N "node$number" >&2
  done
  for _ in $(seq 60); do
    [ "$(sinfo -h -N -o %t 2>/dev/null | grep -c idle)" = "$nodes" ] && break
    sleep 0.5
  done
  [ "$(sinfo -h -N -o %t | grep -c idle)" = "$nodes" ] || fail "the nodes did not come up; see $dir/*.log"
  echo "export SLURM_CONF=$SLURM_CONF"
}

stop() {
  local file
  scancel --user=root >/dev/null 2>&1 || true
  for file in "$dir"/slurmd.*.pid "$dir/slurmctld.pid" "$dir/munge.pid"; do
    [ -e "$file" ] && kill "$(cat "$file")" 2>/dev/null || true
  done
  sleep 1
  rm -rf "$dir"
}

case "${1:-}" in
  start) start ;;
  stop) stop ;;
  *) fail "say start or stop" ;;
esac
