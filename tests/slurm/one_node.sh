#!/usr/bin/env bash
# Bring up a SLURM of one node on this machine, run a command in it, take it down again:
#
#   tests/slurm/one_node.sh sinfo
#
# For tests only: everything lives in a temporary folder and listens on the loopback alone. As root,
# with Debian's packages: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
# No accounting database: sacct knows nothing, so ask for files and for squeue.
set -euo pipefail

home=$(mktemp -d /tmp/one-node-slurm.XXXXXX)
mkdir "$home/state" "$home/spool"
export SLURM_CONF=$home/slurm.conf

# Workers stand for a cluster's: they must not see variables of this terminal's own job, if any.
unset "${!SLURM_@}" 2>/dev/null || true
export SLURM_CONF=$home/slurm.conf

cat >"$SLURM_CONF" <<CONF
ClusterName=one
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthType=auth/munge
# A job that is put back in the queue waits until its old credential has expired: 120 s by default.
AuthInfo=socket=$home/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/slurmd.pid
SlurmctldLogFile=$home/slurmctld.log
SlurmdLogFile=$home/slurmd.log
# Processes are found by their group: containers often lend no control groups, and little of /proc.
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2
ReturnToService=2
KillWait=2
NodeName=$(hostname) NodeAddr=127.0.0.1 CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=UNLIMITED State=UP
CONF

ended() {
  code=$?
  scancel --user=root --quiet 2>/dev/null || true
  for name in slurmd slurmctld munged; do
    [ -s "$home/$name.pid" ] && kill "$(cat "$home/$name.pid")" 2>/dev/null || true
  done
  sleep 1
  if [ "$code" -ne 0 ]; then tail -n 20 "$home"/slurm*.log >&2; fi
  rm -rf "$home"
}
trap ended EXIT

head -c 1024 /dev/urandom >"$home/munge.key"
chmod 400 "$home/munge.key"
munged --force --key-file="$home/munge.key" --socket="$home/munge.socket" \
  --pid-file="$home/munged.pid" --log-file="$home/munged.log" --seed-file="$home/munge.seed"
slurmctld
slurmd

for _ in $(seq 60); do
  sinfo --noheader --format=%t 2>/dev/null | grep -qx idle && break
  sleep 0.5
done
sinfo --noheader --format='node %N: %t, %c CPUs'
"$@"
