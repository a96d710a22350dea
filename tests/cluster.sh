#!/usr/bin/env bash
# Two "hosts", node1 and node2, out of namespaces (network, host name, processes, mounts, IPC) on one veth pair, each with an sshd;
# the file system is shared. And a SLURM over both. Needs root.  bash tests/cluster.sh up|down|slurm_up|slurm_down DIR [LINES...]
# Their network namespaces are called by the last part of DIR, so that several clusters can stand side by side.
set -eu
DIR=$2 NAME=${2##*/}
mkdir -p "$DIR" /run/sshd

pid_of() { cat "$DIR/$1.pid"; }
on() { local node=$1; shift; nsenter -t "$(pid_of "$node")" -n -u -p -i -m --wd="$PWD" -- "$@"; }

up() {
  ssh-keygen -q -t ed25519 -N '' -f "$DIR/id"
  for i in 1 2; do
    node=node$i etc=/etc/netns/$NAME-node$i
    ip netns add "$NAME-$node"
    mkdir -p "$etc/ssh"
    printf '127.0.0.1 localhost\n10.77.0.1 node1\n10.77.0.2 node2\n' >"$etc/hosts"
    ssh-keygen -q -t ed25519 -N '' -f "$etc/ssh/ssh_host_ed25519_key"
    cp "$DIR/id.pub" "$etc/ssh/authorized_keys"
    printf '%s\n' "ListenAddress 10.77.0.$i" "HostKey /etc/ssh/ssh_host_ed25519_key" "StrictModes no" "UsePAM no" \
      "AuthorizedKeysFile /etc/ssh/authorized_keys" "PidFile $DIR/sshd-$node.pid" >"$etc/ssh/sshd_config"
    printf '%s\n' "Host *" "IdentityFile $DIR/id" "IdentitiesOnly yes" "StrictHostKeyChecking no" \
      "UserKnownHostsFile /dev/null" "LogLevel ERROR" >"$etc/ssh/ssh_config"
  done
  ip link add v1 netns "$NAME-node1" type veth peer name v2 netns "$NAME-node2"
  for i in 1 2; do
    node=node$i
    ip -n "$NAME-$node" link set "v$i" name eth0
    ip -n "$NAME-$node" addr add "10.77.0.$i/24" dev eth0
    ip -n "$NAME-$node" link set lo up
    ip -n "$NAME-$node" link set eth0 up
    setsid ip netns exec "$NAME-$node" unshare --uts --pid --ipc --fork --kill-child --mount-proc sh -c \
      "hostname $node; mount -t tmpfs tmpfs /dev/shm; exec /usr/sbin/sshd -D -E $DIR/sshd-$node.log" </dev/null >/dev/null 2>&1 &
    until [ -s "$DIR/sshd-$node.pid" ]; do sleep 0.1; done
    for pid in $(ip netns pids "$NAME-$node"); do # the first process of the node, as it is called out here
      if [ "$(cat "/proc/$pid/comm")" = sshd ]; then echo "$pid" >"$DIR/$node.pid"; fi
    done
  done
}

down() {
  for node in "$NAME-node1" "$NAME-node2"; do
    for pid in $(ip netns pids "$node" 2>/dev/null); do kill -9 "$pid" 2>/dev/null || true; done
    ip netns del "$node" 2>/dev/null || true
    rm -rf "/etc/netns/$node"
  done
}

slurm_up() { # LINES...: more of slurm.conf
  mkdir -p "$DIR/state" "$DIR/spool.node1" "$DIR/spool.node2"
  printf '%s\n' ClusterName=lab 'SlurmctldHost=node1(10.77.0.1)' SlurmUser=root SlurmdUser=root AuthType=auth/munge \
    CredType=cred/munge AuthInfo=cred_expire=5 MpiDefault=none ProctrackType=proctrack/linuxproc TaskPlugin=task/none \
    JobAcctGatherType=jobacct_gather/none AccountingStorageType=accounting_storage/none SelectType=select/cons_tres \
    SelectTypeParameters=CR_Core SchedulerParameters=sched_interval=1,bf_interval=2,batch_sched_delay=0 \
    SlurmdParameters=config_overrides ReturnToService=2 KillWait=30 OverTimeLimit=0 PreemptType=preempt/partition_prio \
    PreemptMode=REQUEUE "StateSaveLocation=$DIR/state" "SlurmdSpoolDir=$DIR/spool.%n" "SlurmctldPidFile=$DIR/ctld.pid" \
    "SlurmdPidFile=$DIR/slurmd.%n.pid" "SlurmctldLogFile=$DIR/ctld.log" "SlurmdLogFile=$DIR/slurmd.%n.log" GresTypes=gpu \
    'NodeName=node1 NodeAddr=10.77.0.1 CPUs=2 RealMemory=8000 Gres=gpu:1 State=UNKNOWN' \
    'NodeName=node2 NodeAddr=10.77.0.2 CPUs=2 RealMemory=8000 Gres=gpu:1 State=UNKNOWN' \
    'PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 State=UP' \
    'PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP' "$@" >"$DIR/slurm.conf"
  echo 'Name=gpu File=/dev/zero' >"$DIR/gres.conf"
  echo 'CgroupPlugin=cgroup/v1' >"$DIR/cgroup.conf" # found by itself, it wants /sys/fs/cgroup
  export SLURM_CONF=$DIR/slurm.conf
  install -d -o munge -g munge -m 755 /run/munge
  install -d -o munge -g munge -m 700 /var/log/munge /var/lib/munge
  pgrep -x munged >/dev/null || runuser -u munge -- /usr/sbin/munged --pid-file=/run/munge/munged.pid
  on node1 slurmctld -f "$SLURM_CONF"
  for node in node1 node2; do on "$node" slurmd -f "$SLURM_CONF"; done
  for _ in $(seq 60); do
    [ "$(on node1 sinfo -h -p low -t idle -o %D)" != 2 ] || return 0
    sleep 0.5
  done
  cat "$DIR/ctld.log" >&2
  return 1
}

slurm_down() {
  for node in node1 node2; do on "$node" pkill -x slurmd || true; done
  on node1 pkill -x slurmctld || true
  sleep 1
  rm -rf "$DIR/state" "$DIR"/spool.* # jobs of one SLURM are not for the next
}

COMMAND=$1
shift 2
"$COMMAND" "$@"
