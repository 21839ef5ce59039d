#!/usr/bin/env bash
# Pretrains on two hosts of this one machine: two network namespaces joined by a virtual cable. Needs root and iproute2.
usage='usage: bash scripts/two_hosts.sh LAUNCH_FILE RECIPE [--out DIR] [key=value ...]
  as in: bash scripts/two_hosts.sh recipes/accelerate/cpu_zero2.yaml recipes/pretrain/tiny.yaml training.device=cpu

Starts one `accelerate launch` of one process on each host, and ends with the worse of their exit statuses. SIGTERM,
SIGUSR1 and Ctrl-C go to both launchers. PROGRAM (perturbdiff) is the module that is run.
It prints the names of the hosts; cut and mend the cable while the run goes on with
  ip -n HOST link set eth0 down
  ip -n HOST link set eth0 up'
set -euo pipefail

if [ $# -lt 2 ] || [ "${1#-}" != "$1" ]; then
  echo "$usage" >&2
  exit 2
fi
launch_file=$1
shift
for command in ip accelerate; do
  command -v "$command" > /dev/null || { echo "two_hosts: there is no command '$command' here" >&2; exit 2; }
done

hosts=("perturbdiff-$$-0" "perturbdiff-$$-1")
launchers=()
remove() {
  for launcher in "${launchers[@]}"; do kill -KILL "$launcher" 2> /dev/null || true; done
  for host in "${hosts[@]}"; do
    ip netns pids "$host" 2> /dev/null | xargs -r kill -KILL 2> /dev/null || true
    ip netns delete "$host" 2> /dev/null || true
    rm -rf "/etc/netns/$host"
  done
}
trap remove EXIT
pass_on() {
  for launcher in "${launchers[@]}"; do kill "-$1" "$launcher" 2> /dev/null || true; done
}
for signal in TERM INT USR1; do trap "pass_on $signal" "$signal"; done

for host in "${hosts[@]}"; do
  # Its /etc/hosts and /etc/resolv.conf: torch asks for the names of both addresses, in the form of IPv6, and there is
  # no name server.
  mkdir -p "/etc/netns/$host"
  printf '127.0.0.1 localhost\n::ffff:10.0.0.1 %s\n::ffff:10.0.0.2 %s\n' "${hosts[@]}" > "/etc/netns/$host/hosts"
  : > "/etc/netns/$host/resolv.conf"
  ip netns add "$host"
  ip -n "$host" link set lo up
done
ip link add eth0 netns "${hosts[0]}" type veth peer name eth0 netns "${hosts[1]}"
for rank in 0 1; do
  ip -n "${hosts[$rank]}" address add "10.0.0.$((rank + 1))/24" dev eth0
  ip -n "${hosts[$rank]}" link set eth0 up
done
echo "hosts       ${hosts[0]} (10.0.0.1), ${hosts[1]} (10.0.0.2)"

# The interface for gloo and for the rendezvous; torchrun passes SIGUSR1 on only where told to.
export GLOO_SOCKET_IFNAME=eth0 TP_SOCKET_IFNAME=eth0
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
for rank in 0 1; do
  ip netns exec "${hosts[$rank]}" accelerate launch --config_file "$launch_file" \
    --num_machines 2 --num_processes 2 --machine_rank "$rank" --rdzv_backend static \
    --main_process_ip 10.0.0.1 --main_process_port 29500 \
    -m "${PROGRAM:-perturbdiff}" pretrain "$@" &
  launchers+=($!)
done

worst=0
for launcher in "${launchers[@]}"; do
  while kill -0 "$launcher" 2> /dev/null; do wait "$launcher" || true; done  # a signal that is passed on interrupts it
  wait "$launcher" && code=0 || code=$?
  if [ "$code" -gt "$worst" ]; then worst=$code; fi
done
exit "$worst"
