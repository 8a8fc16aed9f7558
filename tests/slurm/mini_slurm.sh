#!/usr/bin/env bash
# mini_slurm.sh — a real Slurm cluster (slurmctld + N slurmd + munged) on ONE bare Debian machine, no systemd.
#
#   mini_slurm.sh start            install packages if missing, bring the cluster up, wait until every node is idle
#   mini_slurm.sh stop             cancel jobs, kill all daemons and job processes, remove namespaces/bridge/files
#   mini_slurm.sh status           sinfo + squeue + pids
#   mini_slurm.sh exec NODE CMD..  run CMD inside a "node" (its network/uts/pid/ipc/mount namespaces)
#   mini_slurm.sh kill-node NODE   crash a node: SIGKILL everything in it, link down (slurmctld notices as on real HW)
#   mini_slurm.sh start-node NODE  boot a killed node again
#   mini_slurm.sh logs             tail of all daemon logs
#
# Every node is its own {net,uts,pid,ipc,mnt} namespace: own IP (10.77.0.1x), own hostname, own localhost ports, own
# /dev/shm, own pids.  The file system (/tmp, $HOME, ...) is shared by all nodes, like a cluster's NFS.
# Where namespaces are not allowed (no CAP_NET_ADMIN/CAP_SYS_ADMIN) it falls back to MSL_MODE=multi: several slurmd on
# one host, told apart by port; every "node" then shares hostname/pids, node names resolve to 127.0.0.1x, and MPI
# programs need OMPI_MCA_btl=self,tcp (Open MPI takes the "nodes" for one host and its shared memory set-up fails).
# srun/sbatch/squeue work from the ordinary root shell (login node = the machine itself, 10.77.0.1).
# Knobs (environment): MSL_NODES=4  MSL_PREFIX=sn  MSL_CPUS=64  MSL_MEM=262144 (MiB)  MSL_GPUS=8 (fake gres, 0 = none)
#   MSL_MODE=netns|multi (default: netns if possible)  MSL_SUBNET=10.77.0  MSL_DIR=/run/mini-slurm  MSL_PARTITION=batch
#   MSL_PYXIS=1: accept pyxis' --container-* options (ignored; their values reach tasks as MSL_CONTAINER_*); needs gcc
#   MSL_NO_APT=1 (never install)  MSL_PRIVATE_TMP=1 (node-local /tmp)
# CPUs/memory/GPUs are what the scheduler believes (config_overrides), not what the machine has.
set -euo pipefail
NODES=${MSL_NODES:-4} PREFIX=${MSL_PREFIX:-sn} CPUS=${MSL_CPUS:-64} MEM=${MSL_MEM:-262144} GPUS=${MSL_GPUS:-8}
NET=${MSL_SUBNET:-10.77.0} D=${MSL_DIR:-/run/mini-slurm} PART=${MSL_PARTITION:-batch} BR=mslbr0
MODE=${MSL_MODE:-} CONF=$D/slurm.conf MARK='# mini-slurm'
export SLURM_CONF=$CONF
say() { echo "[mini_slurm] $*" >&2; }
die() {
  say "ERROR: $*"
  exit 1
}
[[ $(id -u) == 0 ]] || die "must be root"
if [[ -e $D/params && ${1:-} != start ]]; then
  # shellcheck source=/dev/null
  . "$D/params" # stop/status use what start was given
fi
names() {
  local i
  for ((i = 1; i <= NODES; i++)); do echo "$PREFIX$i"; done
}
ipof() {
  local b=$NET
  [[ $MODE == netns ]] || b=127.0.0
  echo "$b.$((10 + ${1#"$PREFIX"}))"
}
ctlip() { if [[ $MODE == netns ]]; then echo "$NET.1"; else echo 127.0.0.1; fi; }
pick_mode() {
  [[ -z $MODE ]] || return 0
  MODE=multi
  if ip netns add msl-probe 2>/dev/null; then
    if ip link add mslprobe0 type veth peer name mslprobe1 netns msl-probe 2>/dev/null; then
      ip link del mslprobe0
      ip link add mslprobe0 type bridge 2>/dev/null && ip link del mslprobe0 && MODE=netns
    fi
    ip netns del msl-probe
  fi
}
alive() { [[ -n ${1:-} && -e /proc/$1/status ]] && ! grep -qs '^State:[[:space:]]*Z' "/proc/$1/status"; }
pidof_file() { [[ -s $1 ]] && cat "$1" || true; }

install_pkgs() {
  local need=() p
  for p in slurmctld:slurmctld slurmd:slurmd srun:slurm-client munged:munge ip:iproute2; do
    command -v "${p%%:*}" >/dev/null || [[ -x /usr/sbin/${p%%:*} ]] || need+=("${p##*:}")
  done
  if [[ -n ${MSL_PYXIS:-} ]] && ! command -v gcc >/dev/null; then need+=(gcc libc6-dev); fi
  [[ $(ldconfig -p) == *libpmix.so.2* ]] || need+=(libpmix2) # srun --mpi=pmix
  ((${#need[@]})) || return 0
  [[ -z ${MSL_NO_APT:-} ]] || die "missing packages: ${need[*]}"
  say "apt-get install ${need[*]}"
  local pol=/usr/sbin/policy-rc.d made=
  if [[ ! -e $pol ]]; then
    printf '#!/bin/sh\nexit 101\n' >$pol
    chmod 755 $pol
    made=1
  fi # do not start services
  local rc=0
  export DEBIAN_FRONTEND=noninteractive
  { apt-get -o DPkg::Lock::Timeout=600 update -qq &&
    apt-get -o DPkg::Lock::Timeout=600 install -y -qq --no-install-recommends "${need[@]}"; } >"$D/apt.log" 2>&1 || rc=$?
  [[ -z $made ]] || rm -f $pol
  ((rc == 0)) || {
    tail -20 "$D/apt.log" >&2
    die "apt-get failed ($rc)"
  }
}

write_conf() {
  local n i
  { declare -p NODES PREFIX CPUS MEM GPUS NET PART MODE; } >"$D/params"
  cat >"$CONF" <<EOF
ClusterName=mini
SlurmctldHost=$(hostname -s)($(ctlip))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$D/munge.sock
CryptoType=crypto/munge
CommunicationParameters=NoAddrCache
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
LaunchParameters=use_interactive_step
ReturnToService=2
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
TmpFS=$D/nodetmp/%n
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd-%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
MinJobAge=60
KillWait=3
UnkillableStepTimeout=20
SlurmctldTimeout=30
SlurmdTimeout=10
InactiveLimit=0
WaitTime=0
MessageTimeout=10
TCPTimeout=2
EOF
  # slurmd 22.05 initialises a cgroup plugin even when nothing uses it; naming v1 skips the /sys/fs/cgroup probe
  printf 'CgroupPlugin=cgroup/v1\nCgroupMountpoint=%s\nCgroupAutomount=no\n' "$D/cgroup" >"$D/cgroup.conf"
  mkdir -p "$D/cgroup"
  local g=""
  : >"$D/gres.conf"
  if ((GPUS > 0)); then
    g=" Gres=gpu:$GPUS"
    echo "GresTypes=gpu" >>"$CONF"
    mkdir -p "$D/dev"
    for ((i = 0; i < GPUS; i++)); do mknod "$D/dev/nvidia$i" c 1 3; done # fake GPUs: clones of /dev/null, enough for gres/gpu
    echo "NodeName=${PREFIX}[1-$NODES] Name=gpu File=$D/dev/nvidia[0-$((GPUS - 1))]" >"$D/gres.conf"
  fi
  for n in $(names); do
    local how="NodeHostname=$n"
    [[ $MODE == netns ]] || how="NodeHostname=$(hostname -s) Port=$((16820 + ${n#"$PREFIX"}))"
    echo "NodeName=$n NodeAddr=$(ipof "$n") $how CPUs=$CPUS RealMemory=$MEM$g State=UNKNOWN" >>"$CONF"
  done
  echo "PartitionName=$PART Nodes=${PREFIX}[1-$NODES] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO" >>"$CONF"
}

# A stand-in for NVIDIA's pyxis SPANK plugin: same command line options, no containers.
pyxis_stub() {
  [[ -n ${MSL_PYXIS:-} ]] || return 0
  local v
  v=$(srun -V | awk '{split($2, a, "."); print a[1] * 65536 + a[2] * 256 + a[3]}')
  mkdir -p "$D/lib"
  cat >"$D/lib/pyxis_stub.c" <<'EOF'
#include <ctype.h>
#include <stdio.h>
#include <string.h>
typedef struct spank_handle *spank_t;                                  /* the parts of slurm/spank.h that are needed */
struct spank_option { char *name, *arginfo, *usage; int has_arg, val; int (*cb)(int, const char *, int); };
extern int spank_option_register(spank_t, struct spank_option *);
extern int spank_setenv(spank_t, const char *, const char *, int);
const char plugin_name[] = "pyxis_stub", plugin_type[] = "spank";
const unsigned int plugin_version = SLURM_VER, spank_plugin_version = 1;
static const char *opts[] = {"container-image=", "container-mounts=", "container-workdir=", "container-name=", "container-save=",
  "container-env=", "container-mount-home", "no-container-mount-home", "container-remap-root", "no-container-remap-root",
  "container-entrypoint", "no-container-entrypoint", "container-entrypoint-log", "container-writable", "container-readonly", 0};
static char val[32][4096];
static int cb(int i, const char *arg, int remote) { snprintf(val[i], sizeof val[i], "%s", arg && *arg ? arg : "1"); return 0; }
int slurm_spank_init(spank_t sp, int ac, char **av) {
  static char names[32][64];
  for (int i = 0; opts[i]; i++) {
    strcpy(names[i], opts[i]); char *e = strchr(names[i], '='); if (e) *e = 0;
    struct spank_option o = {names[i], e ? "VALUE" : 0, "[pyxis stub] ignored", e ? 1 : 0, i, cb};
    if (spank_option_register(sp, &o)) return -1;
  }
  return 0;
}
int slurm_spank_user_init(spank_t sp, int ac, char **av) {
  for (int i = 0; opts[i]; i++) if (val[i][0]) {
    char n[96] = "MSL_"; size_t k = 4;
    for (const char *p = opts[i]; *p && *p != '='; p++) n[k++] = *p == '-' ? '_' : toupper(*p);
    n[k] = 0; spank_setenv(sp, n, val[i], 1);
  }
  return 0;
}
EOF
  gcc -shared -fPIC -O1 -DSLURM_VER="$v" -o "$D/lib/pyxis_stub.so" "$D/lib/pyxis_stub.c" || die "pyxis stub does not compile"
  echo "required $D/lib/pyxis_stub.so" >"$D/plugstack.conf"
  echo "PlugStackConfig=$D/plugstack.conf" >>"$CONF"
}

hosts_add() {
  hosts_del
  {
    echo "$(ctlip) mslctl $MARK"
    for n in $(names); do echo "$(ipof "$n") $n $MARK"; done
  } >>/etc/hosts
}
hosts_del() { # rewrite in place (bind-mounted /etc/hosts cannot be renamed over)
  if grep -qs "$MARK" /etc/hosts; then
    local t
    t=$(grep -v "$MARK" /etc/hosts || true)
    printf '%s\n' "$t" >/etc/hosts
  fi
}

net_up() {
  [[ $MODE == netns ]] || return 0
  ip link show $BR >/dev/null 2>&1 || ip link add $BR type bridge
  ip addr replace "$NET.1/24" dev $BR
  ip link set $BR up
}

# PID 1 of a node: a tiny reaper that keeps the namespaces alive and runs slurmd; killing it kills the whole node.
boot_node() {
  mkdir -p "$D/spool/$1" "$D/nodetmp/$1"
  chmod 1777 "$D/nodetmp/$1"
  if [[ $MODE != netns ]]; then
    MSL_NODE=$1 setsid /usr/sbin/slurmd -D -N "$1" -f "$CONF" </dev/null >>"$D/log/slurmd-$1.out" 2>&1 &
    echo $! >"$D/node-$1.pid"
    return 0
  fi
  local n=$1 ns=msl-$1 i=${1#"$PREFIX"} ip
  ip=$(ipof "$n")
  ip netns del "$ns" 2>/dev/null || true
  ip link del "mslv$i" 2>/dev/null || true
  ip netns add "$ns"
  ip link add "mslv$i" type veth peer name eth0 netns "$ns"
  ip link set "mslv$i" master $BR up
  ip -n "$ns" link set lo up
  ip -n "$ns" addr add "$ip/24" dev eth0
  ip -n "$ns" link set eth0 up
  ip -n "$ns" route add default via "$NET.1"
  mkdir -p "/etc/netns/$ns"
  {
    echo "127.0.0.1 localhost"
    echo "::1 localhost"
    echo "$NET.1 mslctl $(hostname -s)"
    for m in $(names); do echo "$(ipof "$m") $m"; done
  } >"/etc/netns/$ns/hosts"
  rm -f "$D/node-$n.pid"
  # shellcheck disable=SC2016  # the node's own shell expands it
  setsid ip netns exec "$ns" unshare --uts --ipc --pid --mount --fork --kill-child --mount-proc \
    bash -c '
      hostname "$1"; mount -t tmpfs -o size=50% tmpfs /dev/shm
      [[ -z $4 ]] || mount --bind "$3/nodetmp/$1" /tmp      # MSL_PRIVATE_TMP=1: node-local /tmp as on real clusters
      echo ready >"$3/node-$1.up"
      /usr/sbin/slurmd -D -N "$1" -f "$2" >>"$3/log/slurmd-$1.out" 2>&1 &
      sd=$!
      trap "kill -TERM $sd 2>/dev/null; exit 0" TERM
      while :; do wait -n 2>/dev/null || sleep 0.5; done' \
    node-init "$n" "$CONF" "$D" "${MSL_PRIVATE_TMP:-}" </dev/null >>"$D/log/node-$n.out" 2>&1 &
  echo $! >"$D/node-$n.outer"
  # pid (as seen from outside) of the node's init = the child of unshare
  local t=0 outer
  outer=$(cat "$D/node-$n.outer")
  while ((t++ < 100)); do
    local u c
    u=$(cat "/proc/$outer/task/$outer/children" 2>/dev/null || true)
    for c in $u $outer; do
      local x
      x=$(tr '\0' ' ' <"/proc/$c/cmdline" 2>/dev/null || true)
      if [[ $x == *"node-init $n "* && $x == bash* ]]; then
        echo "$c" >"$D/node-$n.pid"
        return 0
      fi
    done
    sleep 0.05
  done
  die "node $n did not come up; see $D/log/node-$n.out"
}

halt_node() {
  local n=$1 i=${1#"$PREFIX"} p e
  p=$(pidof_file "$D/node-$n.pid")
  if [[ $MODE != netns ]]; then # slurmd and stepds carry MSL_NODE, job processes SLURMD_NODENAME + our SLURM_CONF
    for e in /proc/[0-9]*/environ; do
      if { tr '\0' '\n' <"$e"; } 2>/dev/null | awk -v n="$n" -v c="$CONF" '
           $0=="MSL_NODE=" n{m=1} $0=="SLURMD_NODENAME=" n{a=1} $0=="SLURM_CONF=" c{b=1} END{exit !(m||a&&b)}'; then
        p=${e#/proc/}
        kill -KILL "${p%/environ}" 2>/dev/null || true
      fi
    done
    rm -f "$D/node-$n.pid"
    return 0
  fi
  if alive "$p" && tr '\0' ' ' <"/proc/$p/cmdline" | grep -q "node-init $n "; then kill -KILL "$p"; fi # takes the pid namespace with it
  p=$(pidof_file "$D/node-$n.outer")
  if [[ -n $p ]]; then for _ in {1..50}; do
    alive "$p" || break
    sleep 0.05
  done; fi
  ip link del "mslv$i" 2>/dev/null || true
  ip netns del "msl-$n" 2>/dev/null || true
  rm -rf "/etc/netns/msl-$n" "$D/node-$n.pid" "$D/node-$n.outer"
}

start() {
  [[ ! -e $D/params ]] || die "already started (run '$0 stop' first)"
  mkdir -p "$D"/{state,spool,log}
  chmod 755 "$D"
  trap 'say "start failed, cleaning up (logs kept in $D.failed)"; rm -rf "$D.failed"; cp -r "$D/log" "$D.failed"; stop' EXIT
  install_pkgs
  pick_mode
  write_conf
  pyxis_stub
  hosts_add
  net_up
  # Debian's mpi/pmix plugin dlopens <libdir>/pmix2/lib/libpmix.so, an unversioned name that only libpmix-dev ships
  local px
  px=$(dpkg -L libpmix2 | awk '/\/pmix2\/lib\/libpmix\.so\.2$/{sub(/\.2$/, ""); p = $0} END{print p}')
  [[ -e $px ]] || {
    ln -s libpmix.so.2 "$px"
    echo "$px" >"$D/pmix-link"
  }
  # munge: private key and socket, so a system munge is neither needed nor disturbed
  (
    umask 077
    head -c 1024 /dev/urandom >"$D/munge.key"
  )
  munged --force --key-file="$D/munge.key" --socket="$D/munge.sock" --pid-file="$D/munged.pid" \
    --log-file="$D/log/munged.log" --seed-file="$D/munge.seed" --num-threads=2 2>>"$D/log/munged.log"
  for _ in {1..50}; do
    munge -S "$D/munge.sock" -n >/dev/null 2>&1 && break
    sleep 0.1
  done
  munge -S "$D/munge.sock" -n >/dev/null || die "munged does not answer"
  /usr/sbin/slurmctld -c -f "$CONF" >"$D/log/slurmctld.out" 2>&1
  local n
  for n in $(names); do boot_node "$n"; done
  mkdir -p /etc/slurm
  [[ -e /etc/slurm/slurm.conf ]] || ln -s "$CONF" /etc/slurm/slurm.conf # so no SLURM_CONF is needed
  local t=0
  until [[ $(sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l) == "$NODES" ]]; do
    ((t++ < 150)) || {
      sinfo -N -l >&2 || true
      logs >&2
      die "nodes not idle after 30 s"
    }
    sleep 0.2
  done
  trap - EXIT
  say "up ($MODE): $NODES nodes ($(sinfo -h -o '%N %G')), SLURM_CONF=$CONF"
}

stop() {
  set +e
  if alive "$(pidof_file "$D/slurmctld.pid")"; then # let running srun clients see a clean cancellation
    timeout 3 scancel -u root >/dev/null 2>&1
    for _ in {1..20}; do
      [[ -z $(timeout 3 squeue -h 2>/dev/null) ]] && break
      sleep 0.1
    done
  fi
  local n p f
  for n in $(names); do halt_node "$n"; done
  for f in slurmctld munged; do # no state worth saving: SIGKILL (TERM can take 10+ s)
    p=$(pidof_file "$D/$f.pid")
    if alive "$p" && [[ $(cat "/proc/$p/comm") == "$f"* ]]; then kill -KILL "$p"; fi
  done
  ip link del $BR 2>/dev/null
  hosts_del
  [[ $(readlink /etc/slurm/slurm.conf 2>/dev/null) == "$CONF" ]] && rm -f /etc/slurm/slurm.conf
  [[ -s $D/pmix-link ]] && rm -f "$(cat "$D/pmix-link")"
  rmdir /etc/netns 2>/dev/null
  rm -rf "$D"
  say "down"
  set -e
}

logs() { tail -n 15 "$D"/log/* 2>/dev/null || true; }

case ${1:-} in
  start) start ;;
  stop) stop ;;
  restart)
    stop
    start
    ;;
  status)
    sinfo -N -l
    squeue -a
    for n in $(names); do echo "$n init pid $(pidof_file "$D/node-$n.pid")"; done
    ;;
  logs) logs ;;
  env) echo "export SLURM_CONF=$CONF" ;;
  exec)
    n=$2
    shift 2
    p=$(pidof_file "$D/node-$n.pid")
    alive "$p" || die "node $n is not running"
    [[ $MODE == netns ]] || exec "$@"
    exec nsenter -t "$p" -n -u -i -p -m --wd="$PWD" -- "$@"
    ;;
  kill-node)
    halt_node "$2"
    say "$2 killed"
    ;;
  start-node)
    boot_node "$2"
    say "$2 booted"
    ;;
  *)
    sed -n '2,23p' "$0"
    exit 2
    ;;
esac
